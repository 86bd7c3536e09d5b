import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

APPLY = Path(__file__).parents[2] / "patches" / "apply.sh"
FILE = Path("vllm/v1/sample/rejection_sampler.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The patched file of the installed vLLM, in a source tree of its own."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / FILE).parent.mkdir(parents=True)
    shutil.copy(Path(spec.origin).parent.parent / FILE, tmp_path / FILE)
    return tmp_path


def apply(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([APPLY, tree, *arguments], capture_output=True, text=True)


def test_patches_apply_once_and_are_taken_back_to_the_byte(tree: Path):
    before = (tree / FILE).read_bytes()
    assert apply(tree).returncode == 0
    after = (tree / FILE).read_bytes()
    assert after != before
    again = apply(tree)
    assert again.returncode == 1
    assert "nothing was changed" in again.stderr
    assert (tree / FILE).read_bytes() == after
    assert apply(tree, "--reverse").returncode == 0
    assert (tree / FILE).read_bytes() == before


def test_a_folder_without_vllm_is_named(tmp_path: Path):
    assert "holds no folder vllm" in apply(tmp_path).stderr


def test_the_patched_function_expands_on_cpu(tree: Path):
    assert apply(tree).returncode == 0
    spec = importlib.util.spec_from_file_location("patched_rejection_sampler", tree / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = torch.tensor([0.7, 9.0, 0.0])
    expanded = module.expand_batch_to_tokens(temperature, cumulative, 5, replace_from=0, replace_to=1)
    assert expanded.tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0, 1.0])
