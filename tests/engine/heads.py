"""Exit heads made for a test, without training."""

from pathlib import Path

import torch

from vllm_earlyexit.heads.checkpoint import ExitHeadConfig, Heads, HeadsConfig
from vllm_earlyexit.heads.fingerprint import fingerprint, text_config
from vllm_earlyexit.heads.modules import HeadKind, build_head


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
