"""Model Runner V1: where the drafter meets vLLM's batch, block tables and attention metadata."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.drafter import SelfExitDrafter
from vllm_earlyexit.engine.frontier import Frontier, Step
from vllm_earlyexit.engine.seams import CONFIG_KEY

logger = init_logger("vllm.earlyexit")


class SelfExitProposer:
    """vLLM's proposer for self-exit speculation (``method="custom_class"`` creates it in the worker)."""

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        assert isinstance(vllm_config.additional_config, dict)
        self.config = EarlyExitConfig(**vllm_config.additional_config[CONFIG_KEY])
        self.max_model_len = vllm_config.model_config.max_model_len

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the loaded target model; drafting shares its weights."""
        self.drafter = SelfExitDrafter(target_model, self.config)
        logger.info("self-exit speculation with %s", self.config)

    def warm_up(self, device: torch.device) -> None:
        """Compile what drafting runs, while vLLM compiles and profiles the model."""
        self.drafter.shallow.trace(self.vllm_config, device)

    def propose(
        self,
        runner: Any,
        sampled_token_ids: list[list[int]],
        sampled_from: torch.Tensor,
        verified: list[int] | None,
        longest: int,
    ) -> list[list[int]]:
        """Draft for every request of the batch that has just sampled.

        Args:
            runner: The V1 model runner, after bookkeeping.
            sampled_token_ids: What each request of the batch sampled; empty while its prompt is not finished.
            sampled_from: Final hidden states from which tokens were sampled, [num_sampled, hidden_size]: request by
                request, one for each draft token that was verified and one more.
            verified: How many draft tokens of each request were verified; None if there were none at all.
            longest: The longest draft the scheduler wants this step.

        Returns:
            The drafted tokens of each request, at most ``longest`` and possibly none.
        """
        rows = [row for row, sampled in enumerate(sampled_token_ids) if sampled]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if not rows or longest == 0:
            return drafts
        device = runner.device
        last = [sampled_token_ids[row][-1] for row in rows]
        positions = [int(runner.input_batch.num_tokens_no_spec[row]) - 1 for row in rows]
        limits = [
            self._limit(runner.requests[runner.input_batch.req_ids[row]], position, longest)
            for row, position in zip(rows, positions, strict=True)
        ]
        frontier = Frontier(
            torch.tensor(last, dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            torch.tensor(limits, dtype=torch.int64, device=device),
        )
        batch_rows = torch.tensor(rows, device=device)
        starts = [0, *itertools.accumulate(1 + n for n in verified or [0] * len(sampled_token_ids))]
        newest = torch.tensor([starts[row] + len(sampled_token_ids[row]) - 1 for row in rows], device=device)
        drafted = self.drafter.draft(
            frontier, sampled_from[newest], lambda step: self._kv_context(runner, batch_rows, step)
        )
        for row, draft in zip(rows, drafted, strict=True):
            drafts[row] = draft
        return drafts

    def _limit(self, request: Any, position: int, longest: int) -> int:
        """Return how many tokens are worth drafting for a request whose newest token stands at ``position``.

        Verification adds one token of its own, so the draft may take all but one of those that are still wanted.
        """
        wanted = self.max_model_len - 1 - position
        if request.sampling_params is not None and request.sampling_params.max_tokens is not None:
            wanted = min(wanted, request.sampling_params.max_tokens - len(request.output_token_ids))
        return max(0, min(longest, wanted - 1))

    @contextmanager
    def _kv_context(self, runner: Any, batch_rows: torch.Tensor, step: Step) -> Iterator[None]:
        """A forward context of one token per sequence, KV going to the target's own blocks."""
        n = len(step.rows)
        rows, seq_lens = batch_rows[step.rows], (step.positions + 1).to(torch.int32)
        starts = torch.arange(n + 1, dtype=torch.int32)
        longest = int(seq_lens.max())
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group_id, attn_groups in enumerate(runner.attn_groups):
            names = {name for group in attn_groups for name in group.layer_names}
            if names.isdisjoint(self.drafter.layer_names):
                continue
            table = runner.input_batch.block_table[group_id]
            blocks = table.get_device_tensor(runner.input_batch.num_reqs)[rows]
            slot_mapping = slots_of(blocks, step.positions, table.block_size)
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(runner.device),
                query_start_loc_cpu=starts,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens.cpu(),
                num_reqs=n,
                num_actual_tokens=n,
                max_query_len=1,
                max_seq_len=longest,
                block_table_tensor=blocks,
                slot_mapping=slot_mapping,
                positions=step.positions,
            )
            for group in attn_groups:
                built = group.build_metadata_for_drafting(common, draft_index=0)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, slot_mapping)
        with set_forward_context(metadata, self.vllm_config, num_tokens=n, slot_mapping=slots):
            yield


def slots_of(blocks: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the KV slots of one position per sequence, int64 [n].

    Args:
        blocks: Block ids of each sequence, [n, max_blocks].
        positions: int64 [n].
        block_size: Tokens per block.
    """
    block_ids = blocks.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    return block_ids.to(torch.int64) * block_size + positions % block_size
