"""Exit heads made for a test, without training."""

from pathlib import Path

import torch

from vllm_earlyexit.assets import shipped_heads
from vllm_earlyexit.heads.checkpoint import ExitHeadConfig, Heads, HeadsConfig, load_heads
from vllm_earlyexit.heads.fingerprint import fingerprint, text_config
from vllm_earlyexit.heads.modules import HeadKind, build_head

LADDER = (1, 4)


def random_heads(folder: Path, model: Path, kind: HeadKind, exit_layer: int, std: float) -> Path:
    """Write a checkpoint with one head of normally distributed weights and the full vocabulary."""
    config = text_config(model)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    query_size = heads * (config.get("head_dim") or hidden // heads)
    head = build_head(kind, hidden, 64, query_size)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std)
    exit_config = ExitHeadConfig(exit_layer=exit_layer, kind=kind, intermediate_size=64, query_size=query_size)
    heads_config = HeadsConfig(
        base_model=model.name,
        fingerprint=fingerprint(model),
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        draft_vocab_size=config["vocab_size"],
        exits=(exit_config,),
    )
    Heads(heads_config, {exit_layer: head}, None).save(folder, storage="float32")
    return folder


def ladder_heads(folder: Path, model: Path) -> Path:
    """Write a checkpoint that has a shipped head, and its calibration, at both exits of ``LADDER``."""
    shipped = load_heads(shipped_heads(fingerprint(model)))
    (first, *_), (module, *_) = shipped.config.exits, shipped.modules.values()
    assert first.calibration is not None
    positions = tuple(at.model_copy(update={"deeper": at.probability}) for at in first.calibration.positions)
    calibrations = [first.calibration.model_copy(update={"positions": positions}), first.calibration]
    exits = [
        first.model_copy(update={"exit_layer": layer, "calibration": calibration})
        for layer, calibration in zip(LADDER, calibrations, strict=True)
    ]
    config = shipped.config.model_copy(update={"exits": tuple(exits), "recommended": None})
    Heads(config, dict.fromkeys(LADDER, module), shipped.draft_vocab).save(folder)
    return folder
