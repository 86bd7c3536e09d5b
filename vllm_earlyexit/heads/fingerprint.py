"""Which model a heads checkpoint belongs to, told from the model's files without loading it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_earlyexit.errors import EarlyExitError

_SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def model_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Return the local folder of ``model``, a folder or a Hub id, fetching the files that vLLM will load anyway.

    Args:
        model: Folder or Hub id.
        revision: Of a Hub id.
        cache: Where vLLM keeps what it fetches, its ``--download-dir``; None for the Hub client's own place.

    Raises:
        EarlyExitError: the model is neither a folder nor to be had from the Hub.
    """
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["original/**/*"]}
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, **wanted))
    except Exception as error:  # the Hub client raises many unrelated types; each means: cannot be had
        raise EarlyExitError(
            f"self-exit: the files of model {model!r} cannot be read ({type(error).__name__}: {error}); "
            "give a local folder or a Hub id that is reachable or cached"
        ) from error


def text_config(folder: Path) -> dict[str, Any]:
    """Return the model's config.json, or its language-model part."""
    config = _config(folder)
    return config.get("text_config", config)


def architectures(folder: Path) -> list[str]:
    """Return the architectures that the model's config.json names."""
    return list(_config(folder).get("architectures") or [])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarlyExitError(f"self-exit: {path} cannot be read ({error}); is {folder} a model folder?") from error


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 over the model's shape and its norm weights, rounded to bfloat16.

    Norm weights are few, stay unquantised and change with every full fine-tune, so the fingerprint is the same for
    any storage type of one model and differs between models. Merged LoRA adapters leave norms alone and are not told
    apart: heads still run losslessly there, only less accurately.

    Raises:
        EarlyExitError: the folder has no readable safetensors files.
    """
    config = text_config(folder)
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _SHAPE_KEYS]).encode())
    norms: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                norms |= {name: tensors.get_tensor(name) for name in tensors.keys() if "norm" in name}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EarlyExitError(f"self-exit: a weight file in {folder} is damaged ({error}); fetch it again") from error
    if not norms:
        raise EarlyExitError(
            f"self-exit: {folder} has no safetensors weights to identify the model by; convert it to safetensors"
        )
    for name in sorted(norms):
        digest.update(name.encode() + norms[name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
