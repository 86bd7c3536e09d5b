"""Counts that a worker makes and its server's metrics page shows.

vLLM's own metrics come from its scheduler; what only a worker sees has no way to them. prometheus_client has one for
servers of several processes: each writes into files of one folder, and the page adds them up.
"""

import functools
import os
import tempfile
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "vllm:self_exit_"
SILENT_TOKENS = "silent_tokens"
EARLY_TOKENS, FULL_DEPTH_TOKENS = "early_tokens", "full_depth_tokens"
INVOLUNTARY_TOKENS = "involuntary_early_tokens"
CHECKED_TOKENS, AGREED_TOKENS, PROMISED_TOKENS = "checked_tokens", "agreed_tokens", "promised_tokens"
MEANING = {
    SILENT_TOKENS: "Tokens about which exit heads said nothing, because their logits were not numbers.",
    EARLY_TOKENS: "Tokens that left early, by exit.",
    FULL_DEPTH_TOKENS: "Other tokens of requests that may exit early.",
    CHECKED_TOKENS: "Tokens that left early and were compared with the full model's choice.",
    AGREED_TOKENS: "Those of them that are the full model's choice.",
    PROMISED_TOKENS: "How many of them were promised to be, by the accuracies that were asked for.",
    INVOLUNTARY_TOKENS: "Tokens that left early though the head was less sure of them than their request asks for.",
}
BY_EXIT = frozenset({EARLY_TOKENS})
VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # set where vLLM, or its user, has such a folder already


def folder() -> str:
    """Return the folder whose counts this process's metrics page shows."""
    return os.environ.get(VLLM_FOLDER) or _own_folder().name


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is gone when this process is."""
    made = tempfile.TemporaryDirectory(prefix="vllm-earlyexit-")
    MultiProcessCollector(REGISTRY, made.name)
    return made


class Counters:
    """This process's counts, zero at first.

    Args:
        where: What ``folder`` returned in the server's process. On another machine, where there is no such folder,
            nothing is counted.
    """

    def __init__(self, where: str):
        there = bool(where) and Path(where).is_dir()
        self._file = _file(Path(where) / f"counter_selfexit{os.getpid()}.db") if there else None
        for name in MEANING.keys() - BY_EXIT:
            self.add(name, 0)

    def add(self, name: str, count: float, **labels: str) -> None:
        """Count some more of what ``MEANING`` names; of what is ``BY_EXIT`` with a label ``exit_layer``."""
        if self._file is not None:
            key = mmap_key(PREFIX + name, f"{PREFIX}{name}_total", [*labels], [*labels.values()], MEANING[name])
            self._file.write_value(key, self._file.read_value(key)[0] + count, 0.0)


@functools.cache
def _file(path: Path) -> MmapedDict:
    """Open a file of counts once; engines that follow one another in a process go on counting."""
    return MmapedDict(str(path))
