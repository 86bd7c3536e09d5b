"""A model run segment by segment computes exactly what the whole model computes."""

from pathlib import Path

import pytest
import torch
from vllm.forward_context import set_forward_context

from tests.engine.conftest import engine, runner_of
from tests.engine.tiny import tiny_model
from vllm_earlyexit.engine.sizes import padded_size

CUTS = {"llama": [[1], [2, 3], [1, 2, 3]], "qwen2": [[2], [1, 3]]}


def forward_whole_and_cut(runner, cuts: list[int], n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the same prefill of n tokens through the whole model and its segments, over fresh KV slots of blocks 1, 2."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    ids = torch.arange(3, 3 + n, dtype=torch.int32)
    positions = torch.arange(n)
    group = runner.attn_groups[0][0]

    def metadata(block: int) -> tuple[dict, dict]:
        slots = positions + block * runner.input_batch.block_table[0].block_size
        common = CommonAttentionMetadata(
            query_start_loc=torch.tensor([0, n], dtype=torch.int32),
            query_start_loc_cpu=torch.tensor([0, n], dtype=torch.int32),
            seq_lens=torch.tensor([n], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=n,
            max_query_len=n,
            max_seq_len=n,
            block_table_tensor=torch.tensor([[block]], dtype=torch.int32),
            slot_mapping=slots,
        )
        built = group.build_metadata(common)
        return dict.fromkeys(group.layer_names, built), dict.fromkeys(group.layer_names, slots)

    with torch.inference_mode():
        attn, slots = metadata(1)
        with set_forward_context(attn, runner.vllm_config, num_tokens=n, slot_mapping=slots):
            whole = runner.model(ids, positions)
        attn, slots = metadata(2)
        with set_forward_context(attn, runner.vllm_config, num_tokens=n, slot_mapping=slots):
            state = None
            for segment in runner.model.segments(cuts):
                state = segment(ids, positions, state)
    assert isinstance(state, torch.Tensor)
    return whole, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_segments_are_bit_identical_to_the_whole(tmp_path: Path, architecture: str, dtype: str):
    model = tiny_model(tmp_path, architecture)
    setting = {"method": "self_exit", "head": "shared", "exit_layer": 1}
    with engine(model, dtype=dtype, skip_tokenizer_init=True, speculative_config=setting) as llm:
        runner = runner_of(llm)
        assert type(runner.model).__name__.startswith("Exit")
        for cuts in CUTS[architecture]:
            whole, cut = forward_whole_and_cut(runner, cuts)
            assert torch.equal(whole, cut), f"cut at {cuts}: differs by up to {(whole - cut).abs().max()}"
            assert whole.float().std() > 0.1


def test_a_pass_over_more_tokens_computes_the_same_and_keeps_no_other_kv(tmp_path: Path):
    model, n = tiny_model(tmp_path, "llama"), 37
    assert padded_size(n) > n
    setting = {"method": "self_exit", "head": "shared", "exit_layer": 1}
    with engine(model, dtype="float32", skip_tokenizer_init=True, speculative_config=setting) as llm:
        runner = runner_of(llm)
        runner.model._segments = ()  # the whole model, over just these tokens
        for cache in runner.kv_caches:
            cache.zero_()
        whole, cut = forward_whole_and_cut(runner, [1], n)
        assert cut.shape == whole.shape
        torch.testing.assert_close(cut, whole)
        for cache in runner.kv_caches:
            assert cache[1].abs().sum() > 0
            torch.testing.assert_close(cache[2], cache[1])
            assert not cache[0].any()
            assert not cache[3:].any(), "only the sequence's own block is written to"
        logits = runner.model.compute_logits(whole)
        runner.model._segments = tuple(runner.model.segments([1]))
        torch.testing.assert_close(runner.model.compute_logits(whole), logits)
        assert len(logits) == n
