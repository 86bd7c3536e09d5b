"""Tiny random models that vLLM and transformers both load."""

from pathlib import Path

import torch


def tiny_model(
    folder: Path,
    architecture: str = "llama",
    vocab_size: int = 64,
    layers: int = 4,
    seed: int = 0,
    tied: bool = False,
) -> Path:
    """Write a random model of 64 hidden units with head size 32.

    Its weights are scaled up so that its distributions are far from uniform, and its later layers add less than its
    first, so that an early exit is often but not always right.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    model = model_class(config_class(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
            if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
                parameter.mul_(0.25)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path, vocab_size: int = 64) -> None:
    """Give a tiny model a tokenizer of the words w0, w1, … and a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({f"w{n}": n for n in range(vocab_size)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
    )
    tokenizer.save_pretrained(folder)
