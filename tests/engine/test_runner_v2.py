"""A little of ``make test-v2``: Model Runner V2 through Triton's interpreter, in a process of its own."""

import os

from tests.engine.test_patched import run


def test_model_runner_v2_through_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    names = "a_little_of_everything or the_end_of_the_context or v1_waits"
    chosen = ("-q", "-p", "no:cacheprovider", "tests/v2", "-k", names)
    assert "3 passed" in run(environment, "-m", "pytest", *chosen)
