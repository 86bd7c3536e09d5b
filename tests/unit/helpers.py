"""A tiny model folder and heads for it, made without any engine."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_earlyexit.heads.checkpoint import (
    Calibration,
    ExitHeadConfig,
    Heads,
    HeadsConfig,
    PositionCalibration,
    Recommendation,
    Threshold,
)
from vllm_earlyexit.heads.fingerprint import fingerprint
from vllm_earlyexit.heads.modules import HeadKind, build_head

HIDDEN, LAYERS, VOCAB = 8, 4, 32


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write what identifies a model: config.json and safetensors with norms."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"model.layers.{n}.input_layernorm.weight": torch.randn(HIDDEN, generator=generator) for n in range(2)}
    save_file({**tensors, "model.norm.weight": torch.ones(HIDDEN)}, folder / "model.safetensors")
    return folder


def calibration(mapped: bool = False) -> Calibration:
    position = PositionCalibration(
        agreement=0.5, entropy=(0.1, 2.0), probability=(0.9, 0.1), expected_calibration_error=0.01
    )
    return Calibration(
        tokens=100,
        agreement=0.5,
        thresholds=(
            Threshold(accuracy=0.7, entropy=1.5, coverage=0.5),
            Threshold(accuracy=0.9, entropy=0.5, coverage=0.2),
        ),
        positions=(position,) if mapped else (),
    )


def make_heads(
    folder: Path, model: Path, kind: HeadKind = "mlp", calibrated: bool = True, mapped: bool = False
) -> Path:
    """Write heads with exits after layers 1 and 2 and a trimmed vocabulary."""
    config = HeadsConfig(
        base_model="tiny",
        fingerprint=fingerprint(model),
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        vocab_size=VOCAB,
        draft_vocab_size=5,
        exits=tuple(
            ExitHeadConfig(
                exit_layer=layer,
                kind=kind,
                intermediate_size=16 if kind == "mlp" else 0,
                calibration=calibration(mapped) if calibrated else None,
            )
            for layer in (1, 2)
        ),
        recommended=Recommendation(
            exit_layer=2,
            num_speculative_tokens=3,
            target_accuracy=0.7,
            predicted_acceptance_length=2.0,
            predicted_speedup=1.1,
        )
        if calibrated
        else None,
    )
    modules = {layer: build_head(kind, HIDDEN, 16) for layer in (1, 2)}
    Heads(config, modules, torch.tensor([1, 2, 3, 30, 31])).save(folder)
    return folder
