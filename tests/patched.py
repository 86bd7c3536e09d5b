"""A patched copy of the installed vLLM."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

PATCHES = Path(__file__).parents[1] / "patches"


def installed() -> Path:
    """Return the folder that contains the installed vLLM's package."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def changed() -> list[str]:
    """Return the files that patches change."""
    patches = "".join(path.read_text() for path in sorted(PATCHES.glob("vllm-*/*.patch")))
    return re.findall(r"^\+\+\+ b/(\S+)", patches, flags=re.MULTILINE)


def apply(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run apply.sh."""
    return subprocess.run([PATCHES / "apply.sh", tree, *arguments], capture_output=True, text=True)


def patched_copy(folder: Path) -> Path:
    """Make a tree in ``folder`` that links to the installed vLLM, but for the files that patches change; patch it."""
    source = installed()
    for parent, _, files in os.walk(source / "vllm"):
        here = folder / Path(parent).relative_to(source)
        if here.name == "__pycache__":
            continue
        here.mkdir(parents=True)
        for name in files:
            original = Path(parent) / name
            if str(original.relative_to(source)) in changed():
                (here / name).write_bytes(original.read_bytes())
            else:
                (here / name).symlink_to(original)
    done = apply(folder)
    assert done.returncode == 0, done.stderr
    return folder
