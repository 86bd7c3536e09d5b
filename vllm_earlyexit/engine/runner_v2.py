"""Model Runner V2: a speculator that drafts with the target's own layers, and resumes in its forward pass.

Like the V1 adapter it decides on the host. The scheduler waits for its drafts, or, with async scheduling, leaves room
for the longest ones. It was run on CPUs through Triton's interpreter, and never on a GPU.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_earlyexit.engine import ahead
from vllm_earlyexit.engine.early_exit import Left
from vllm_earlyexit.engine.rounds import Blocks, Sampled, Scheduled, SelfExit, Verified
from vllm_earlyexit.engine.verification import is_greedy, may_leave
from vllm_earlyexit.engine.verification_v2 import PlainSampler
from vllm_earlyexit.errors import EarlyExitError


@dataclass(frozen=True, eq=False)
class Request:
    """A request since it was last given KV blocks."""

    params: Any
    prompt_len: int


@dataclass(frozen=True)
class Newest:
    """A request's newest token, where it stands, and what was drafted after it."""

    token: int
    position: int
    draft: list[int]


class RunnerV2:
    """What is known of a V2 model runner; rows are those of its request states."""

    def __init__(self, runner: Any):
        self._runner = runner
        self.device: torch.device = runner.device
        self.attn_groups = runner.attn_groups

    @property
    def block_sizes(self) -> list[int]:
        """Tokens per block, by KV cache group."""
        return self._runner.block_tables.block_sizes

    def blocks(self, rows: torch.Tensor) -> Blocks:
        """Return the block tables of some rows."""
        return {group: table.gpu[rows] for group, table in enumerate(self._runner.block_tables.block_tables)}

    def text(self, row: int, length: int) -> np.ndarray:
        """Return the first tokens of a row; on GPUs they lie in host memory that kernels write to."""
        kept = self._runner.req_states.all_token_ids
        shared = getattr(kept, "_uva_buf", None)
        return kept.gpu[row, :length].cpu().numpy() if shared is None else shared.np[row, :length]

    def adapters(self, rows: Callable[[], list[int]]) -> AbstractContextManager[None]:
        """Do nothing: with LoRA adapters V1 serves."""
        return nullcontext()


class SelfExitSpeculator(SelfExit, BaseSpeculator):
    """vLLM's speculator for self-exit speculation; also what its drafts are fetched from.

    vLLM's own handler of drafts tells the scheduler of drafts that are all equally long; these are not.
    """

    runner_name = "V2"
    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig):
        if vllm_config.lora_config is not None:
            raise EarlyExitError(
                "self-exit: on Model Runner V2, vLLM 0.32 does not map LoRA adapters to drafted tokens; "
                "set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        super().__init__(vllm_config)
        self.graphs: CudaGraphManager | None = None
        self._requests: dict[str, Request] = {}
        self._batch: InputBatch | None = None
        self._newest: dict[str, Newest] = {}
        self._sampled: list[str] = []
        """For which requests something could be drafted last; others keep what was drafted for them."""
        self._drafts_later = vllm_config.scheduler_config.async_scheduling
        self._due: tuple[InputBatch, Callable[[Mapping[str, int]], torch.Tensor]] | None = None
        """The last batch, and what drafts after it, if that is still to be done."""
        self._planned: dict[str, int] = {}
        self._surplus: dict[str, int] = {}
        self._left: list[tuple[Request, Mapping[int, Left], list[int], int]] = []
        """What has left of the batch that is verified: whose, which tokens of which draft, and its first logits."""

    def attach(self, runner: Any) -> None:
        """Take a runner that has loaded its model."""
        self._runner = runner
        self.load_model(runner.model)
        runner.model.resume = self._forward
        runner.draft_tokens_handler = self
        speculative = self.vllm_config.speculative_config
        if type(runner.rejection_sampler) is RejectionSampler and runner.rejection_sampler.watermark_key is None:
            assert speculative is not None
            runner.rejection_sampler = PlainSampler(runner.sampler, speculative, runner.device, self._left_of)
        elif self.config.exits_early:
            raise EarlyExitError(
                "self-exit: on Model Runner V2 there are no early exits beside watermarks; drop either"
            )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare to capture piecewise graphs of heads, where vLLM captures those of the model, segment by segment.

        Drafts that are verified have lengths of their own, and are resumed; no graph of a whole step could do that.
        """
        self.graphs = None
        if cudagraph_mode.mixed_mode() == CUDAGraphMode.PIECEWISE and not is_breakable_cudagraph_enabled():
            device = self._runner.device
            self.graphs = CudaGraphManager(self.vllm_config, device, CUDAGraphMode.PIECEWISE, decode_query_len=1)

    def capture(self) -> None:
        """Capture graphs of heads; from then on draft steps and resumed verification replay these and the model's."""
        if self.graphs is None:
            return

        def passes(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            def run(mode: CUDAGraphMode) -> None:
                hidden = self._no_states(desc.num_tokens)
                with self.made_up(RunnerV2(self._runner), desc.num_tokens) as positions:
                    context = get_forward_context()
                    context.cudagraph_runtime_mode = mode
                    context.batch_descriptor = BatchDescriptor(num_tokens=desc.num_tokens)
                    for drafted_from in self.drafter.exits:
                        drafted_from.head(hidden, positions, hidden.clone())
                    for fill_in in self.drafter.fill_ins.values():
                        fill_in(hidden, positions)

            return run

        self.graphs.capture(passes, "Capturing CUDA graphs of exit heads and fill-in")
        self.drafter.passes.replay(self._captured_size)

    def _captured_size(self, count: int) -> int | None:
        """Return the size of the captured graphs that so many tokens run in; None if there are none."""
        found = self._runner.cudagraph_manager.dispatch(count, count, None, num_active_loras=0)
        return found.num_tokens if found.cg_mode == CUDAGraphMode.PIECEWISE else None

    def measure(self, runner: Any) -> None:
        """See ``measure_on``."""
        self.measure_on(RunnerV2(runner))

    @torch.inference_mode()
    def cut_down(self, output: Any) -> Any:
        """Return a step as it is run; with async scheduling it was scheduled before it was known what was drafted.

        Nor has anything been drafted yet: who drafts waits for the device, and until now the scheduler has used that
        time. Only what is run next is drafted for, so that its slots are its own still.

        Args:
            output: vLLM's ``SchedulerOutput``.
        """
        self._planned, self._surplus = {}, {}
        if not self._drafts_later:
            return output
        self._planned = {req_id: len(room) for req_id, room in output.scheduled_spec_decode_tokens.items()}
        if self._due is not None:
            (batch, after), self._due = self._due, None
            drafts = after(self._planned).to(self._runner.device)
            self._runner.req_states.draft_tokens[batch.idx_mapping] = drafts
        drafted = {req_id: len(newest.draft) for req_id, newest in self._newest.items()}
        computed = {req_id: newest.position for req_id, newest in self._newest.items()}
        run, self._surplus = ahead.cut_down(output, drafted, computed)
        return run

    def masks(self, grammar: Any) -> Any:
        """Return vLLM's ``GrammarOutput``, or None, for the step as it is run."""
        return ahead.without_surplus(grammar, self._planned, self._surplus) if grammar and self._surplus else grammar

    def tell(self, output: Any) -> None:
        """See ``SelfExit``; also which room for drafts was not needed."""
        super().tell(output)
        ahead.attach(output, self._surplus)

    def scheduled(self, output: Any, batch: InputBatch) -> None:
        """Take note of the batch that is run next.

        Args:
            output: vLLM's ``SchedulerOutput``. Requests that begin, also anew after preemption, are among its new ones.
            batch: What the runner made of it.
        """
        for new in output.scheduled_new_reqs:
            self._requests[new.req_id] = Request(new.sampling_params, new.prompt_len)
            self._newest.pop(new.req_id, None)
        known = self._runner.req_states.req_id_to_index
        if len(self._requests) > len(known):
            self._requests = {req_id: self._requests[req_id] for req_id in known}
            self._newest = {req_id: newest for req_id, newest in self._newest.items() if req_id in known}
        self._batch = batch

    def _forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor | None:
        """Run the model over the batch, resuming what is pending; None if nothing is, or nothing was scheduled."""
        batch, self._batch = self._batch, None
        if batch is None:
            return None

        def sequences() -> list[Scheduled]:
            assert input_ids is not None
            edges = pairwise(batch.query_start_loc_np[: batch.num_reqs + 1].tolist())
            starts = batch.num_computed_tokens_np.tolist()
            each = zip(batch.idx_mapping_np.tolist(), batch.req_ids, starts, edges, strict=True)
            return [
                Scheduled(row, self._requests[req_id], start, self._fed(req_id, end - begin, input_ids[begin:end]))
                for row, req_id, start, (begin, end) in each
            ]

        ids = None if input_ids is None else input_ids[: batch.num_tokens]
        final = self.resume(RunnerV2(self._runner), sequences, ids, positions[: batch.num_tokens])
        return None if final is None else pad(final, (0, 0, 0, len(positions) - len(final)))

    def _fed(self, req_id: str, count: int, on_device: torch.Tensor) -> np.ndarray | torch.Tensor:
        """Return the tokens that a request is about to be fed: those of its draft are known without a look."""
        newest = self._newest.get(req_id)
        known = [] if newest is None else [newest.token, *newest.draft]
        return np.array(known[:count]) if len(known) >= count else on_device

    def _left_of(self, batch: InputBatch) -> torch.Tensor | None:
        """Return which of a batch's logits are for draft tokens that have left; see ``PlainSampler``."""
        self._left, verified, last_round = [], batch.num_draft_tokens_per_req, self._verifying or self._round
        if not self.config.exits_early or last_round is None or verified is None:
            return None
        places: list[int] = []
        starts = batch.cu_num_logits_np.tolist()
        for req_id, start, count in zip(batch.req_ids, starts, verified.tolist(), strict=False):
            request, newest = self._requests[req_id], self._newest.get(req_id)
            draft = [] if newest is None else newest.draft[:count]
            if left := last_round.final(request, draft):
                self._left.append((request, left, draft, start))
                places += [start + n for n in left]
        if not places:
            return None
        flags = torch.zeros(starts[batch.num_reqs], dtype=torch.bool)
        flags[places] = True
        return flags.to(self._runner.device)

    def _check(self) -> None:
        """Compare what has left with what the full model has chosen in its place."""
        of_each, self._left = self._left, []
        if not of_each:
            return
        choices = torch.cat(self._runner.rejection_sampler.choices).tolist()
        for request, left, draft, start in of_each:
            self.check(request, left, draft, choices[start : start + len(draft)])

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft for every request of the batch that has just sampled; arguments and shapes are vLLM's.

        Returns:
            Drafts, int64 [num_reqs, longest draft]; token 0 behind the end of each, which only vLLM's warm-up runs, and
            everywhere if drafting waits for the next step; see ``cut_down``.
        """
        drafts = torch.zeros(input_batch.num_reqs, self.config.num_speculative_tokens, dtype=torch.int64)
        if not dummy_run:
            longest = self.config.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
            after = functools.partial(self._draft_after, input_batch, last_hidden_states, num_sampled, last_sampled)
            if self._drafts_later:
                self._due = input_batch, after
            else:
                drafts = after(dict.fromkeys(input_batch.req_ids, longest))
        return drafts.to(last_hidden_states.device)

    def _draft_after(
        self,
        batch: InputBatch,
        hidden: torch.Tensor,
        num_sampled: torch.Tensor,
        last_sampled: torch.Tensor,
        room: Mapping[str, int],
    ) -> torch.Tensor:
        """Learn what became of the drafts of a batch that has run, and draft for those of its requests that go on.

        Args:
            batch: vLLM's.
            hidden: Final hidden states, [num_tokens, hidden_size].
            num_sampled: How many tokens each request has sampled, int [num_reqs].
            last_sampled: The newest token of every row of the runner, int64 [max_num_reqs, 1].
            room: How many tokens may be drafted for which requests.

        Returns:
            Drafts, int64 [num_reqs, longest draft], on the host.
        """
        if self._round is not None:  # a CUDA graph ran the whole batch from the bottom
            self._verifying, self._round = self._round, None
        index = batch.idx_mapping
        computed = self._runner.req_states.num_computed_tokens.gpu[index]
        of_each = [num_sampled.long(), last_sampled[index].flatten(), computed.long()]
        counts, tokens, positions = torch.stack(of_each).tolist()  # waits for the device
        verified = batch.num_draft_tokens_per_req
        drafted = [0] * len(counts) if verified is None else verified.tolist()
        requests = [self._requests[req_id] for req_id in batch.req_ids]
        self._check()
        each = zip(requests, batch.req_ids, drafted, counts, strict=True)
        going = [one for one in each if one[-1] and not self._was_over(*one[:2])]
        self.learn([Verified(request, req_id, of, count - 1) for request, req_id, of, count in going], requests)
        for row, (req_id, count) in enumerate(zip(batch.req_ids, counts, strict=True)):
            if count:
                self._newest[req_id] = Newest(tokens[row], positions[row], [])
        rows = [row for row, req_id in enumerate(batch.req_ids) if counts[row] and room.get(req_id)]
        self._sampled = [batch.req_ids[row] for row in rows]
        drafts = torch.zeros(len(counts), self.config.num_speculative_tokens, dtype=torch.int64)
        if not rows:
            return drafts
        places, sampler = batch.idx_mapping_np.tolist(), self._runner.sampler

        def sampled(row: int) -> Sampled:
            request, token, position = requests[row], tokens[row], positions[row]
            outputs, params = position + 1 - request.prompt_len, request.params
            limit = self.limit(params, outputs, token, position, room[batch.req_ids[row]])
            leaves = self.config.exits_early and may_leave(params, outputs) and PlainSampler.lets_leave(sampler, params)
            wish, draws = self.wish(params, early=leaves), self.config.draws and params.temperature > 0
            return Sampled(places[row], token, position, limit, wish, is_greedy(params), draws)

        def describe() -> list[Sampled]:
            return [sampled(row) for row in rows]

        def previous() -> torch.Tensor:
            at = [int(batch.cu_num_logits_np[row]) + counts[row] - 1 for row in rows]
            return hidden[batch.logits_indices[at]]

        def from_head(of: Sequence[int], logits: torch.Tensor, drafted: Sequence[Sequence[int]]) -> torch.Tensor:
            chosen = [rows[n] for n in of]
            newest = [(tokens[row], positions[row]) for row in chosen]
            return PlainSampler.sample_from_head(sampler, [places[row] for row in chosen], logits, drafted, newest)

        sampling, drawn = [requests[row] for row in rows], functools.partial(PlainSampler.draw, sampler)
        length = sum(positions[row] for row in rows) // len(rows)
        found = self.draft(RunnerV2(self._runner), sampling, describe, previous, from_head, drawn, length)
        for row, draft in zip(rows, found, strict=True):
            self._newest[batch.req_ids[row]].draft.extend(draft)
            drafts[row, : len(draft)] = torch.tensor(draft)
        return drafts

    def _was_over(self, request: Request, req_id: str) -> bool:
        """Return whether a request had ended, but ran once more because that was scheduled before it was known."""
        newest = self._newest.get(req_id)
        return newest is not None and self.over(request.params, newest.position + 1 - request.prompt_len, newest.token)

    def set_draft_tokens(self, input_batch: InputBatch, draft_tokens: torch.Tensor) -> None:
        """Do nothing: ``propose`` has kept the drafts."""

    def get_draft_tokens(self) -> DraftTokenIds | None:
        """Return each request's draft, for the scheduler."""
        return DraftTokenIds(self._sampled, [[*self._newest[req_id].draft] for req_id in self._sampled])
