"""Where a result comes from: command, commit, versions, CPU and accelerator."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_earlyexit.plugin import installed_vllm


def provenance(command: str = "vllm-earlyexit") -> dict[str, Any]:
    """Return what a result file says about the run that made it; ``command`` is how it was called, less arguments."""
    return {
        "command": f"{command} {shlex.join(sys.argv[1:])}".rstrip(),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("vllm-earlyexit", "torch", "transformers")}
        | {"vllm": installed_vllm(), "python": platform.python_version()},
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    } | ({"accelerator": accelerator} if (accelerator := accelerator_name()) else {})


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def accelerator_name() -> str | None:
    """Return what PyTorch calls the accelerator, None if there is none."""
    import torch

    return torch.get_device_module().get_device_name() if torch.accelerator.is_available() else None


def cpu_name() -> str:
    """Return what the operating system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
