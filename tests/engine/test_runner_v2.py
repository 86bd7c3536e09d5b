"""A little of ``make test-v2``: Model Runner V2 through Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_model_runner_v2_through_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    chosen = ("-q", "-p", "no:cacheprovider", "tests/v2", "-k", "a_little_of_everything")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 passed" in done.stdout
