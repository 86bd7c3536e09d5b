"""Model Runner V2, on a GPU as it is, on a CPU through Triton's interpreter; slow, for correctness only.

vLLM's build for CPUs wants a Triton with a backend of that name, and PyPI's has none. With TRITON_INTERPRET=1 kernels
are run by Python and need no backend, so a stand-in that answers what Triton and vLLM ask of one is enough.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and (INTERPRETED or torch.cuda.is_available())


class CPUDriver:
    """An active driver of one CPU."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def stand_in() -> None:
    """Give Triton a backend, if kernels are interpreted; before vLLM is imported."""
    if not INTERPRETED:
        return
    import triton.backends

    compiler = SimpleNamespace(supports_target=lambda target: False)  # PyTorch's compiler asks
    backend = SimpleNamespace(driver=CPUDriver, compiler=compiler)
    triton.backends.backends["cpu"] = backend  # type: ignore[assignment]


def mend() -> None:
    """Let the interpreter run what compilers accept: integers as masks; top-k and top-p are left to PyTorch.

    vLLM's kernel for the latter calls methods of tensors on what are integers in the interpreter.
    """
    if not INTERPRETED:
        return
    take_integers_as_masks()
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def take_integers_as_masks() -> None:
    """Let the interpreter store under a mask of integers."""
    from triton.runtime.interpreter import InterpreterBuilder, _interpreter

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any, *others: Any) -> Any:
        return _interpreter.store(ptrs.data, value.data, mask.data.astype(bool))

    InterpreterBuilder.create_masked_store = create_masked_store
