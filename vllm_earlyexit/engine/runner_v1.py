"""Model Runner V1: where drafts meet vLLM's batch, block tables and attention metadata."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from vllm_earlyexit.engine import verification
from vllm_earlyexit.engine.rounds import Blocks, Sampled, Scheduled, SelfExit, Verified


class RunnerV1:
    """What is known of a V1 model runner; rows are those of its batch."""

    def __init__(self, runner: Any):
        self._runner, self._batch = runner, runner.input_batch
        self.device: torch.device = runner.device
        self.attn_groups: Sequence[Sequence[Any]] = runner.attn_groups

    @property
    def block_sizes(self) -> Sequence[int]:
        """Tokens per block, by KV cache group."""
        return [self._batch.block_table[n].block_size for n in range(len(self.attn_groups))]

    def blocks(self, rows: torch.Tensor) -> Blocks:
        """Return the block tables of some rows; the first row's also of an empty batch."""
        tables, count = self._batch.block_table, max(1, self._batch.num_reqs)
        return {n: tables[n].get_device_tensor(count)[rows] for n in range(len(self.attn_groups))}

    def text(self, row: int, length: int) -> np.ndarray:
        """Return the first tokens of a row."""
        return self._batch.token_ids_cpu[row, :length]

    @contextmanager
    def adapters(self, rows: Callable[[], list[int]]) -> Iterator[None]:
        """Send some tokens through the LoRA adapters of their requests."""
        runner, batch = self._runner, self._batch
        if runner.lora_config is None:
            yield
            return
        manager, used = runner.lora_manager, set(batch.lora_id_to_lora_request.values())
        whole = manager._adapter_manager._last_mapping
        mapping = tuple(batch.request_lora_mapping[rows()].tolist())
        runner._set_active_loras(mapping, mapping, used)
        try:
            yield
        finally:
            manager.set_active_adapters(used, whole)


class SelfExitProposer(SelfExit):
    """vLLM's proposer for self-exit speculation (``method="custom_class"`` creates it in the worker)."""

    runner_name = "V1"

    def measure(self, runner: Any) -> None:
        """See ``measure_on``."""
        self.measure_on(RunnerV1(runner))

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
        batch = runner.input_batch
        requests = [runner.requests[req_id] for req_id in batch.req_ids]
        counts = verified or [0] * len(requests)
        self.learn(
            [
                Verified(request, request.req_id, drafted, len(sampled) - 1)
                for request, sampled, drafted in zip(requests, sampled_token_ids, counts, strict=True)
                if sampled
            ],
            requests,
        )
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, sampled in enumerate(sampled_token_ids) if sampled]
        if not rows or longest == 0:
            return drafts

        leaves = self.config.exits_early and verification.lets_leave(batch.sampling_metadata)

        def sampled(row: int) -> Sampled:
            request, position = requests[row], int(batch.num_tokens_no_spec[row]) - 1
            token, outputs = sampled_token_ids[row][-1], len(request.output_token_ids)
            params = request.sampling_params
            limit = self.limit(params, outputs, token, position, longest)
            wish = self.wish(params, early=leaves and verification.may_leave(params, outputs))
            return Sampled(row, token, position, limit, wish, verification.is_greedy(params))

        def from_head(of: Sequence[int], logits: torch.Tensor, drafted: Sequence[Sequence[int]]) -> torch.Tensor:
            metadata, outputs = batch.sampling_metadata, batch.req_output_token_ids
            return verification.sample_from_head(
                runner.sampler, [rows[n] for n in of], logits, drafted, metadata, outputs
            )

        def previous() -> torch.Tensor:
            starts = [0, *itertools.accumulate(1 + n for n in counts)]
            return sampled_from[[starts[row] + len(sampled_token_ids[row]) - 1 for row in rows]]

        def describe() -> list[Sampled]:
            return [sampled(row) for row in rows]

        sampling, length = [requests[row] for row in rows], int(batch.num_tokens_no_spec[rows].mean())
        drafted = self.draft(RunnerV1(runner), sampling, describe, previous, from_head, context_length=length)
        for row, draft in zip(rows, drafted, strict=True):
            drafts[row] = draft
        return drafts

    def forward(self, runner: Any, input_ids: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor | None:
        """Run the model over the runner's batch, resuming what is pending; None if nothing is."""
        batch = runner.input_batch

        def scheduled() -> list[Scheduled]:
            edges = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
            starts = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
            return [
                Scheduled(row, runner.requests[req_id], start, batch.token_ids_cpu[row, start : start + end - begin])
                for row, (req_id, start, (begin, end)) in enumerate(
                    zip(batch.req_ids, starts, pairwise(edges), strict=True)
                )
            ]

        return self.resume(RunnerV1(runner), scheduled, input_ids, positions)

    def sample(self, runner: Any, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        """Sample for a batch of which something was drafted; see ``verification``.

        Args:
            runner: The V1 model runner.
            logits: [num_draft_tokens + num_requests, vocab_size].
            metadata: vLLM's ``SpecDecodeMetadata``.
        """
        batch = runner.input_batch
        final = self._final(runner, logits, metadata) if self.config.exits_early else None
        if verification.only_largest(batch.sampling_metadata):
            return verification.take_largest(metadata, logits, final)
        return verification.sample_in_turn(
            runner.sampler, metadata, logits, batch.sampling_metadata, batch.req_output_token_ids, final
        )

    def _final(self, runner: Any, logits: torch.Tensor, metadata: Any) -> list[set[int]] | None:
        """Return which draft tokens of each request have left, None if none have; check those that can be checked."""
        if self._verifying is None:
            return None
        drafts = [draft.tolist() for draft in metadata.draft_token_ids.split(metadata.num_draft_tokens)]
        requests = [runner.requests[req_id] for req_id in runner.input_batch.req_ids]
        final = [self._verifying.final(*each) for each in zip(requests, drafts, strict=True)]
        if not any(final):
            return None
        places = metadata.target_logits_indices.split(metadata.num_draft_tokens)
        for request, left, draft, at in zip(requests, final, drafts, places, strict=True):
            if left:
                self.check(request, left, draft, logits[at].argmax(dim=-1).tolist())
        return [set(left) for left in final]
