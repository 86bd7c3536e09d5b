"""With vLLM patched, self-exit needs no seams, and is as lossless."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patched import patched_copy

ROOT = Path(__file__).parents[2]
EARLY = "tests/engine/test_early_exit.py::test_approximate_kv_is_never_shared"
CHECK = """
from vllm.config.speculative import SpeculativeConfig
from vllm_earlyexit.engine import seams
from vllm_earlyexit import doctor, plugin
import vllm
plugin.register()
print(vllm.__file__, seams.built_in(), seams.applied(), [fact for fact in doctor.examine().facts if "patched" in fact])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which the patched vLLM is imported."""
    tree = patched_copy(tmp_path_factory.mktemp("patched"))
    return os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_nothing_is_changed_at_run_time(environment: dict[str, str]):
    said = run(environment, "-c", CHECK).splitlines()[-1]
    assert said.startswith(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert said.endswith(" True [] ['this vLLM is patched for self-exit, so nothing of it is changed at run time']")


def test_it_is_lossless_without_seams(environment: dict[str, str]):
    """Engines of these tests assert that no seam is applied where vLLM is patched."""
    lossless = "tests/engine/test_lossless.py::test_greedy_outputs_are_identical"
    chosen = [f"{lossless}[fixed-3]", "tests/engine/test_sampling.py", f"{EARLY}[propagate]"]
    plainly = ("-q", "-p", "no:cacheprovider", "--matrix", "small")
    assert " passed" in run(environment, "-m", "pytest", *plainly, *chosen)
