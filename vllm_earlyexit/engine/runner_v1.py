"""Model Runner V1: where the drafter meets vLLM's batch, block tables and attention metadata."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import SamplerOutput

from vllm_earlyexit.config import CONFIG_KEY, AdditionalConfig, EarlyExitConfig
from vllm_earlyexit.engine import verification
from vllm_earlyexit.engine.cost import SIZES, measured
from vllm_earlyexit.engine.drafter import Pending, SelfExitDrafter
from vllm_earlyexit.engine.frontier import Frontier, of_rows
from vllm_earlyexit.engine.lookup import repeat_in
from vllm_earlyexit.engine.policy import AutoPolicy
from vllm_earlyexit.engine.ranks import run_by_first
from vllm_earlyexit.provenance import cpu_name

logger = init_logger("vllm.earlyexit")

MEASURED_POSITION = 255


class SelfExitProposer:
    """vLLM's proposer for self-exit speculation (``method="custom_class"`` creates it in the worker)."""

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        assert isinstance(vllm_config.additional_config, AdditionalConfig)
        self.config = EarlyExitConfig(**vllm_config.additional_config[CONFIG_KEY])
        self.max_model_len = vllm_config.model_config.max_model_len
        self._round: Round | None = None
        self._verifying: Round | None = None

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the loaded target model; drafting shares its weights."""
        self.drafter = SelfExitDrafter(target_model, self.config, self.vllm_config)
        logger.info("self-exit speculation with %s", self.config)

    @torch.inference_mode()
    def measure(self, runner: Any) -> None:
        """Compile the heads, and time a step's parts if the policy wants to know; KV goes to vLLM's null block."""
        scheduler = self.vllm_config.scheduler_config
        longest = min(scheduler.max_num_seqs * (self.config.num_speculative_tokens + 1), self.max_model_len // 2)
        position = min(MEASURED_POSITION, self.max_model_len - 2)

        def run(n: int) -> list[float]:
            ids = torch.zeros(n, dtype=torch.int32, device=runner.device)
            positions = torch.full((n,), position, dtype=torch.int64, device=runner.device)
            blocks = {
                number: torch.zeros_like(runner.input_batch.block_table[number].get_device_tensor(1)).expand(n, -1)
                for number in range(len(runner.attn_groups))
            }
            with _adapters(runner, lambda: [0] * n), self._kv_context(runner, blocks, None, positions):
                return self.drafter.timed(ids, positions)

        run(2)  # compiles the heads, for any number of tokens
        policy = self.drafter.policy

        def take_times(on_all: Callable[[int], list[float]]) -> None:
            assert isinstance(policy, AutoPolicy)
            parts = measured(self._times_file(longest), on_all, longest)
            policy.times = [parts.of_exit(number) for number in range(len(self.drafter.exits))]
            logger.info("self-exit: seconds per step part: %s", policy.times)

        if isinstance(policy, AutoPolicy):
            run_by_first(take_times, run)

    def _times_file(self, longest: int) -> Path:
        """Return where step times are kept from start to start, on this machine and with this setting."""
        known = [self.vllm_config.compute_hash(), SIZES, longest, cpu_name(), torch.get_num_threads()]
        if torch.accelerator.is_available():
            known.append(torch.get_device_module().get_device_name())
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        return Path(envs.VLLM_CACHE_ROOT) / "self_exit" / f"step-times-{key}.json"

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
        self._learn(runner, sampled_token_ids, verified)
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
        frontier = Frontier(last, positions, limits, device)

        def previous() -> torch.Tensor:
            starts = [0, *itertools.accumulate(1 + n for n in verified or [0] * len(sampled_token_ids))]
            return sampled_from[[starts[row] + len(sampled_token_ids[row]) - 1 for row in rows]]

        @functools.cache
        def blocks() -> dict[int, torch.Tensor]:
            return self._blocks(runner, torch.tensor(rows, device=device))

        @contextmanager
        def context(on: torch.Tensor, counts: torch.Tensor | None, at: torch.Tensor) -> Iterator[None]:
            tables = {group: of_rows(table, on) for group, table in blocks().items()}

            def owners() -> list[int]:
                return [rows[n] for n in (on if counts is None else on.repeat_interleave(counts)).tolist()]

            with _adapters(runner, owners), self._kv_context(runner, tables, counts, at):
                yield

        drafted = self.drafter.draft(
            frontier,
            previous,
            context,
            lambda n, draft: repeat_in(self._text(runner, rows[n], positions[n], draft), limits[n] - len(draft)),
        )
        requests = [runner.requests[runner.input_batch.req_ids[row]] for row in rows]
        self._round = Round(frontier, {id(request): n for n, request in enumerate(requests)}, requests, positions)
        for row, draft in zip(rows, drafted, strict=True):
            drafts[row] = draft
        return drafts

    def forward(self, runner: Any, input_ids: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor | None:
        """Run the model over vLLM's batch, resuming what is pending; None if nothing is.

        Whatever was pending is forgotten: a request that was not scheduled, or not as it was drafted, starts anew.
        """
        last_round, self._round = self._round, None
        self._verifying = last_round
        if last_round is None or not last_round.frontier.state_shape or input_ids is None:
            return None
        batch, frontier = runner.input_batch, last_round.frontier
        edges = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        owner: list[int] = []
        passed: list[int] = []
        places: list[tuple[int, int]] = []
        for row, (start, end) in enumerate(pairwise(edges)):
            found, same = last_round.held(runner, row, end - start)
            owner += [row] * (end - start)
            passed += [*(1 + cut for cut in frontier.cuts(found)[:same]), *[0] * (end - start - same)]
            places += [(found, column) for column in range(same)]
        if not places:
            return None

        @contextmanager
        def context(low: Sequence[int]) -> Iterator[None]:
            counts = Counter(owner[at] for at in low)
            tables = self._blocks(runner, torch.tensor([*counts], device=positions.device))
            each = torch.tensor([*counts.values()], device=positions.device)
            with (
                _adapters(runner, lambda: [owner[at] for at in low]),
                self._kv_context(runner, tables, each, positions[low]),
            ):
                yield

        return self.drafter.verify(input_ids, positions, Pending(frontier.states(places), passed), context)

    def sample(self, runner: Any, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        """Sample for a batch of which something was drafted; see ``verification``.

        Args:
            runner: The V1 model runner.
            logits: [num_draft_tokens + num_requests, vocab_size].
            metadata: vLLM's ``SpecDecodeMetadata``.
        """
        batch = runner.input_batch
        if verification.only_largest(batch.sampling_metadata):
            return verification.take_largest(metadata, logits)
        return verification.sample_in_turn(
            runner.sampler, metadata, logits, batch.sampling_metadata, batch.req_output_token_ids
        )

    @staticmethod
    def _text(runner: Any, row: int, position: int, draft: Sequence[int]) -> np.ndarray:
        """Return a batch row's tokens up to a position, followed by a draft."""
        tokens = runner.input_batch.token_ids_cpu[row, : position + 1]
        return np.concatenate([tokens, np.array(draft, dtype=tokens.dtype)]) if draft else tokens

    def _limit(self, request: Any, position: int, longest: int) -> int:
        """Return how many tokens are worth drafting for a request whose newest token stands at ``position``.

        Verification adds one token of its own, so the draft may take all but one of those that are still wanted.
        """
        wanted, params = self.max_model_len - 1 - position, request.sampling_params
        if params is not None:
            done = request.output_token_ids
            if params.max_tokens is not None:
                wanted = min(wanted, params.max_tokens - len(done))
            if len(done) >= params.min_tokens and done[-1] in (params.eos_token_id, *(params.stop_token_ids or ())):
                return 0
        return max(0, min(longest, wanted - 1))

    def _learn(self, runner: Any, sampled_token_ids: list[list[int]], verified: list[int] | None) -> None:
        """Tell the policy what became of the last round's drafts, and whether there was nothing but that round."""
        last_round, self._verifying = self._verifying, None
        batch = runner.input_batch
        if last_round is None or any(id(runner.requests[req_id]) not in last_round.rows for req_id in batch.req_ids):
            self.drafter.policy.interrupt()
        if last_round is None or verified is None:
            return
        for row, (sampled, drafted) in enumerate(zip(sampled_token_ids, verified, strict=True)):
            found = last_round.rows.get(id(runner.requests[batch.req_ids[row]]))
            if found is not None and sampled and drafted:
                self.drafter.policy.learn(found, drafted, len(sampled) - 1)

    def _blocks(self, runner: Any, rows: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the block tables of some of the batch's rows, int64 [n], by KV cache group; each [n, max_blocks]."""
        tables, num_reqs = runner.input_batch.block_table, runner.input_batch.num_reqs
        return {n: tables[n].get_device_tensor(num_reqs)[rows] for n in range(len(runner.attn_groups))}

    @contextmanager
    def _kv_context(
        self, runner: Any, blocks: dict[int, torch.Tensor], counts: torch.Tensor | None, positions: torch.Tensor
    ) -> Iterator[None]:
        """A forward context of some tokens of some sequences, KV going to the target's own blocks.

        Args:
            runner: The V1 model runner.
            blocks: The sequences' block tables by KV cache group, each [n, max_blocks].
            counts: Tokens of each sequence, int64 [n]; None for one each.
            positions: Of the tokens, rising within a sequence, int64 [counts.sum()].
        """
        num_tokens = len(positions)
        if counts is None:
            n, most = num_tokens, 1
            starts = torch.arange(n + 1, dtype=torch.int32)
            seq_lens = (positions + 1).to(torch.int32)
        else:
            n, most = len(counts), int(counts.max())
            ends = counts.cumsum(0)
            starts = torch.zeros(n + 1, dtype=torch.int32)
            starts[1:] = ends
            seq_lens = (positions[ends - 1] + 1).to(torch.int32)
        seq_lens_cpu = seq_lens.cpu()
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for number, attn_groups in enumerate(runner.attn_groups):
            size = runner.input_batch.block_table[number].block_size
            table = blocks[number] if counts is None else blocks[number].repeat_interleave(counts, dim=0)
            slot_mapping = slots_of(table, positions, size)
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(runner.device),
                query_start_loc_cpu=starts,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens_cpu,
                num_reqs=n,
                num_actual_tokens=num_tokens,
                max_query_len=most,
                max_seq_len=int(seq_lens_cpu.max()),
                block_table_tensor=blocks[number],
                slot_mapping=slot_mapping,
                positions=positions,
            )
            for group in attn_groups:
                built = group.build_metadata_for_drafting(common, draft_index=0)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, slot_mapping)
        with set_forward_context(metadata, self.vllm_config, num_tokens=num_tokens, slot_mapping=slots):
            yield


def measure(worker: Any) -> None:
    """Let a worker's proposer measure; for vLLM's ``collective_rpc``."""
    worker.model_runner.drafter.measure(worker.model_runner)


@contextmanager
def _adapters(runner: Any, rows: Callable[[], list[int]]) -> Iterator[None]:
    """Send some tokens through the LoRA adapters of their requests; those of the whole batch are back afterwards.

    Args:
        runner: The V1 model runner.
        rows: Makes the batch row of each token; called if there may be adapters.
    """
    if runner.lora_config is None:
        yield
        return
    batch, manager = runner.input_batch, runner.lora_manager
    whole, used = manager._adapter_manager._last_mapping, set(batch.lora_id_to_lora_request.values())
    mapping = tuple(batch.request_lora_mapping[rows()].tolist())
    runner._set_active_loras(mapping, mapping, used)
    try:
        yield
    finally:
        manager.set_active_adapters(used, whole)


@dataclass(frozen=True)
class Round:
    """A round of drafting whose tokens the next forward pass may find pending.

    Attributes:
        frontier: What is pending.
        rows: Row of each request in the frontier, by the request's identity.
        requests: The requests, so that they and their identities outlive the round.
        positions: Position of each row's first pending token.
    """

    frontier: Frontier
    rows: dict[int, int]
    requests: list[Any]
    positions: list[int]

    def held(self, runner: Any, row: int, scheduled: int) -> tuple[int, int]:
        """Return a batch row's row in the frontier and how many of its scheduled tokens are pending, possibly 0."""
        batch = runner.input_batch
        found = self.rows.get(id(runner.requests[batch.req_ids[row]]))
        if found is None or batch.num_computed_tokens_cpu[row] != self.positions[found]:
            return 0, 0
        start, pending = self.positions[found], self.frontier.pending(found)
        fed = batch.token_ids_cpu[row, start : start + min(scheduled, len(pending))].tolist()
        same = 0
        while same < len(fed) and fed[same] == pending[same]:
            same += 1
        return found, same


def slots_of(blocks: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the KV slots of positions, int64 [n].

    Args:
        blocks: Block ids of each position's sequence, [n, max_blocks].
        positions: int64 [n].
        block_size: Tokens per block.
    """
    block_ids = blocks.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    return block_ids.to(torch.int64) * block_size + positions % block_size
