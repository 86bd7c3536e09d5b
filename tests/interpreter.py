"""Model Runner V2 on a CPU: Triton's interpreter in the place of a compiler; slow, for correctness only.

vLLM's build for CPUs wants a Triton with a backend of that name, and PyPI's has none. With TRITON_INTERPRET=1 kernels
are run by Python and need no backend, so a stand-in that answers what Triton and vLLM ask of one is enough.
"""

import os
from types import SimpleNamespace

import torch

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and os.environ.get("TRITON_INTERPRET") == "1"


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
    """Give Triton a backend; before vLLM is imported."""
    import triton.backends

    backend = SimpleNamespace(driver=CPUDriver, compiler=None)
    triton.backends.backends["cpu"] = backend  # type: ignore[assignment]


def leave_out_what_is_not_interpreted() -> None:
    """Let vLLM choose top-k and top-p in PyTorch; its kernel calls methods of tensors on the interpreter's integers."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
