"""Rounds of drafting and what becomes of them: what the adapters to vLLM's model runners have in common."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from vllm import envs
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_earlyexit.config import AdditionalConfig, EarlyExitConfig
from vllm_earlyexit.engine import responses
from vllm_earlyexit.engine.cost import MEASURED_CONTEXT, SIZES, Run, Shape, measured
from vllm_earlyexit.engine.drafter import Drawing, HeadSampler, Leaving, Pending, SelfExitDrafter
from vllm_earlyexit.engine.early_exit import LOSSLESS, Left, Wish, wish_of
from vllm_earlyexit.engine.frontier import Frontier, of_rows
from vllm_earlyexit.engine.lookup import repeat_in
from vllm_earlyexit.engine.policy import AutoPolicy
from vllm_earlyexit.engine.ranks import run_by_first
from vllm_earlyexit.engine.sizes import NO_SLOT
from vllm_earlyexit.provenance import accelerator_name, cpu_name

logger = init_logger("vllm.earlyexit")


def no_sampler(rows: Sequence[int], logits: torch.Tensor, drafts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Stand for a runner that cannot let requests sample from heads."""
    raise NotImplementedError("early exits of requests that sample")


RowSampler = Callable[[Sequence[int], torch.Tensor, torch.Tensor], torch.Tensor]
"""As ``Drawing.draw``, from rows of the runner."""

Blocks = dict[int, torch.Tensor]
"""Block tables of some sequences by KV cache group, each [num_seqs, max_blocks]."""


class Runner(Protocol):
    """What an adapter knows of its model runner. Rows are the runner's own numbers of sequences."""

    device: torch.device
    attn_groups: Sequence[Sequence[Any]]

    @property
    def block_sizes(self) -> Sequence[int]:
        """Tokens per block, by KV cache group."""
        ...

    def blocks(self, rows: torch.Tensor) -> Blocks:
        """Return the block tables of some rows, int64 [n]."""
        ...

    def adapters(self, rows: Callable[[], list[int]]) -> AbstractContextManager[None]:
        """Send some tokens through the LoRA adapters of their requests; those of the whole batch are back afterwards.

        Args:
            rows: Makes the row of each token; called if there may be adapters.
        """
        ...

    def text(self, row: int, length: int) -> np.ndarray:
        """Return the first tokens of a row, int [length]."""
        ...


@dataclass(frozen=True)
class Sampled:
    """A sequence that has just sampled.

    Attributes:
        row: The runner's.
        token: Its newest token, for which no KV is written yet.
        position: Of that token.
        limit: How many tokens are worth drafting.
        wish: What the request asks for.
        greedy: Whether it wants the most probable token and nothing else.
        draws: Whether it drafts with the random numbers that verification will use; see ``Drawing``.
    """

    row: int
    token: int
    position: int
    limit: int
    wish: Wish = LOSSLESS
    greedy: bool = True
    draws: bool = False


@dataclass(frozen=True)
class Scheduled:
    """A sequence of a batch that is about to run.

    Attributes:
        row: The runner's.
        request: An object that is this request's alone for as long as its KV stays where it is.
        position: Of its first token.
        tokens: All its tokens, int [num_tokens].
    """

    row: int
    request: object
    position: int
    tokens: np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Verified:
    """What became of a sequence's draft.

    Attributes:
        request: See ``Scheduled``.
        req_id: vLLM's.
        drafted: Tokens that were verified.
        accepted: How many of them were.
    """

    request: object
    req_id: str
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Round:
    """A round of drafting whose tokens the next forward pass may find pending.

    Attributes:
        frontier: What is pending; of no sequences if nothing was to be drafted for any.
        requests: Those that have sampled; kept, so that their identities outlive the round. See ``Scheduled``.
        sampled: Of each, or of none, as in the frontier.
        skipped: Of rows of which some tokens skip layers, how many do.
    """

    frontier: Frontier
    requests: Sequence[object]
    sampled: Sequence[Sampled]
    skipped: dict[int, int] = field(default_factory=dict)

    @functools.cached_property
    def rows(self) -> dict[int, int]:
        """Row of each request in the frontier, by the request's identity."""
        return {id(request): row for row, request in enumerate(self.requests)}

    def final(self, request: object, draft: Sequence[int]) -> dict[int, Left]:
        """Return which tokens of the draft that is verified for a request, counted from 0, have left, possibly none."""
        found = self.rows.get(id(request))
        if found is None:
            return {}
        drafted = self.frontier.draft(found)
        return {n: left for n, left in self.frontier.left(found).items() if list(draft[: n + 1]) == drafted[: n + 1]}

    def held(self, scheduled: Scheduled) -> tuple[int, int]:
        """Return a sequence's row in the frontier and how many of its scheduled tokens are pending, possibly 0."""
        found = self.rows.get(id(scheduled.request))
        if found is None or scheduled.position != self.sampled[found].position:
            return 0, 0
        pending = self.frontier.pending(found)
        fed = scheduled.tokens[: len(pending)].tolist()
        same = 0
        while same < len(fed) and fed[same] == pending[same]:
            same += 1
        return found, same


class SelfExit:
    """Self-exit speculation, whichever the model runner is.

    Args:
        vllm_config: vLLM's, with our setting in its ``additional_config``.
    """

    runner_name: str

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        assert isinstance(vllm_config.additional_config, AdditionalConfig)
        self.config = EarlyExitConfig.of(vllm_config)
        self.max_model_len = vllm_config.model_config.max_model_len
        self._round: Round | None = None
        self._verifying: Round | None = None
        self._left_now: dict[str, dict[int, int]] = {}

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the loaded target model; drafting shares its weights."""
        self.drafter = SelfExitDrafter(target_model, self.config, self.vllm_config)
        logger.info("self-exit speculation on Model Runner %s with %s", self.runner_name, self.config)

    @torch.inference_mode()
    def measure_on(self, runner: Runner) -> None:
        """Compile heads and fill-in, time a step's parts if the policy wants to know; KV goes to vLLM's null block."""
        scheduler = self.vllm_config.scheduler_config
        longest = min(scheduler.max_num_seqs * (self.config.num_speculative_tokens + 1), self.max_model_len // 2)
        logger.info("self-exit: %s", how_it_runs(self.vllm_config.compilation_config, self.drafter.passes.replays))

        def run(shape: Shape) -> list[float]:
            with self.made_up(runner, *astuple(shape)) as positions:
                ids = torch.zeros(shape.tokens, dtype=torch.int32, device=runner.device)
                return self.drafter.timed(ids, positions)

        run(Shape(2))  # compiles the heads, for any number of tokens
        with self.made_up(runner, 2) as positions:
            for fill_in in self.drafter.fill_ins.values():
                fill_in(self._no_states(2), positions)
        policy = self.drafter.policy

        def take_times(on_all: Run) -> None:
            assert isinstance(policy, AutoPolicy)
            parts = measured(self._times_file(longest), on_all, longest, self.max_model_len - 1)
            policy.times = [parts.of_exit(number) for number in range(len(self.drafter.exits))]
            logger.info("self-exit: seconds per step part: %s", policy.times)

        if isinstance(policy, AutoPolicy):
            run_by_first(take_times, run)

    def _no_states(self, n: int) -> torch.Tensor:
        """Return hidden states of tokens that are made up, [n, hidden_size]."""
        model, device = self.vllm_config.model_config, self.vllm_config.device_config.device
        dtype: Any = model.dtype
        return torch.zeros(n, model.get_hidden_size(), dtype=dtype, device=device)

    @contextmanager
    def made_up(
        self, runner: Runner, n: int, context: int = MEASURED_CONTEXT, spread: bool = True
    ) -> Iterator[torch.Tensor]:
        """A forward context of n tokens of no request; yields their positions. Other arguments as in ``Shape``.

        They attend to whatever the KV cache holds, and their own KV is not kept. Call it before anything is served.
        """
        any_blocks = runner.blocks(torch.zeros(1, dtype=torch.int64, device=runner.device))
        num_seqs = min(n, self.vllm_config.scheduler_config.max_num_seqs) if spread else 1
        counts = torch.full((num_seqs,), n // num_seqs)
        counts[: n % num_seqs] += 1
        last = max(min(context, self.max_model_len - 1), int(counts.max())) - 1
        at = torch.cat([torch.arange(last - count + 1, last + 1) for count in counts.tolist()])
        blocks = {group: self._any_blocks(table, num_seqs) for group, table in any_blocks.items()}
        with runner.adapters(lambda: [0] * n), self._kv_context(runner, blocks, counts, at, kept=False) as positions:
            yield positions

    def _any_blocks(self, table: torch.Tensor, num_seqs: int) -> torch.Tensor:
        """Return block tables like ``table`` for so many sequences, each of blocks of its own as far as there are."""
        places = torch.arange(num_seqs * table.shape[1], dtype=table.dtype, device=table.device)
        return (places % (self.vllm_config.cache_config.num_gpu_blocks or 1)).view(num_seqs, -1)

    def _times_file(self, longest: int) -> Path:
        """Return where step times are kept from start to start, on this machine and with this setting."""
        known = [self.vllm_config.compute_hash(), SIZES, longest, cpu_name(), torch.get_num_threads()]
        if accelerator := accelerator_name():
            known.append(accelerator)
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        return Path(envs.VLLM_CACHE_ROOT) / "self_exit" / f"step-times-{key}.json"

    def draft(
        self,
        runner: Runner,
        requests: Sequence[object],
        describe: Callable[[], Sequence[Sampled]],
        previous: Callable[[], torch.Tensor],
        sample: HeadSampler = no_sampler,
        draw: RowSampler | None = None,
        context_length: int = 0,
    ) -> list[list[int]]:
        """Draft for sequences that have just sampled; return the drafted tokens of each, possibly none.

        Args:
            runner: What is known of the model runner.
            requests: At least one; see ``Scheduled``.
            describe: Tells of each; called if something may be drafted or tokens may leave.
            previous: Makes the final hidden states from which their newest tokens were sampled,
                [num_seqs, hidden_size].
            sample: Lets requests sample from a head's logits; called if tokens of some that are not greedy leave.
            draw: Lets requests draw with the random numbers of verification; called if some do.
            context_length: Tokens of each sequence, on average.
        """
        drafts = self.drafter.starts(len(requests), context_length)
        sampled = describe() if drafts or self.config.exits_early else []
        limits = [one.limit for one in sampled]
        frontier = Frontier([one.token for one in sampled], [one.position for one in sampled], limits, runner.device)
        self._round = Round(frontier, requests, sampled)
        if not drafts:
            return [[] for _ in requests]
        rows = [one.row for one in sampled]
        limits_of = [self.drafter.early.limits(one.wish) for one in sampled]
        leaving = None
        if any(limit is not None for limit in limits_of):
            leaving = Leaving(limits_of, [one.greedy for one in sampled], sample)

        drawing = None
        if draw is not None and any(one.draws for one in sampled):
            drawing = Drawing([one.draws for one in sampled], lambda at, *said: draw([rows[n] for n in at], *said))

        @functools.cache
        def blocks() -> Blocks:
            return runner.blocks(torch.tensor(rows, device=runner.device))

        @contextmanager
        def context(on: torch.Tensor, counts: torch.Tensor | None, at: torch.Tensor) -> Iterator[torch.Tensor]:
            tables = {group: of_rows(table, on) for group, table in blocks().items()}

            def owners() -> list[int]:
                return [rows[n] for n in (on.cpu() if counts is None else on.cpu().repeat_interleave(counts)).tolist()]

            with runner.adapters(owners), self._kv_context(runner, tables, counts, at) as positions:
                yield positions

        def text(n: int, draft: Sequence[int]) -> np.ndarray:
            tokens = runner.text(rows[n], sampled[n].position + 1)
            return np.concatenate([tokens, np.array(draft, dtype=tokens.dtype)]) if draft else tokens

        return self.drafter.draft(
            frontier,
            previous,
            context,
            lambda n, draft: repeat_in(text(n, draft), limits[n] - len(draft)),
            leaving,
            drawing,
        )

    def resume(
        self,
        runner: Runner,
        batch: Callable[[], Sequence[Scheduled]],
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor | None:
        """Run the model over vLLM's batch, resuming what is pending; None if nothing is.

        Whatever was pending is forgotten: a request that was not scheduled, or not as it was drafted, starts anew.

        Args:
            runner: What is known of the model runner.
            batch: Makes the batch's sequences, in its order; called if something may be pending.
            input_ids: int32 [num_tokens]; None if tokens are given as embeddings.
            positions: int64 [num_tokens].

        Returns:
            Hidden states after the final norm, [num_tokens, hidden_size].
        """
        last_round, self._round = self._round, None
        self._verifying = last_round
        if last_round is None or not last_round.frontier.state_shape or input_ids is None:
            return None
        frontier = last_round.frontier
        owner: list[int] = []
        fed_at: list[int] = []
        passed: list[int] = []
        places: list[tuple[int, int]] = []
        skipping: list[int] = []
        for scheduled in batch():
            (found, same), count = last_round.held(scheduled), len(scheduled.tokens)
            if self.config.fill_in == "propagate" and (skipped := self._skips(last_round, found, same, scheduled)):
                skipping += range(len(owner), len(owner) + skipped)
                last_round.skipped[found] = skipped
            owner += [scheduled.row] * count
            fed_at += range(scheduled.position, scheduled.position + count)
            passed += [*(1 + cut for cut in frontier.cuts(found)[:same]), *[0] * (count - same)]
            places += [(found, column) for column in range(same)]
        if not places:
            return None

        @contextmanager
        def context(low: Sequence[int]) -> Iterator[None]:
            counts = Counter(owner[at] for at in low)
            tables = runner.blocks(torch.tensor([*counts], device=positions.device))
            each, at = torch.tensor([*counts.values()]), torch.tensor([fed_at[n] for n in low])
            with runner.adapters(lambda: [owner[n] for n in low]), self._kv_context(runner, tables, each, at):
                yield

        return self.drafter.verify(input_ids, positions, Pending(frontier.states(places), passed, skipping), context)

    def _skips(self, last_round: Round, found: int, same: int, scheduled: Scheduled) -> int:
        """Return how many of a sequence's ``same`` pending tokens skip the layers above: left, not to be checked."""
        next_ones = scheduled.tokens[1 : same + 1].tolist()
        final = last_round.final(scheduled.request, next_ones)
        skipped = next(n for n in itertools.count() if n not in final)
        return 0 if skipped and self.drafter.early.checks() else skipped

    def check(self, request: object, final: Mapping[int, Left], draft: Sequence[int], choices: Sequence[int]) -> None:
        """Compare the tokens of a greedy request that left with the full model's choices, up to the first rejected one.

        Args:
            request: Whose.
            final: See ``Round.final``.
            draft: Its draft.
            choices: The full model's choices in place of each.
        """
        assert self._verifying is not None
        found = self._verifying.rows[id(request)]
        if not self._verifying.sampled[found].greedy:
            return
        unknown = self._verifying.skipped.get(found, 0)
        for n, (token, choice) in enumerate(zip(draft, choices, strict=True)):
            if n not in final and token != choice:
                return
            if n in final and n >= unknown:
                self.drafter.early.checked(final[n], token == choice)

    def limit(self, params: Any, outputs: int, token: int, position: int, longest: int) -> int:
        """Return how many tokens are worth drafting for a request whose newest token stands at ``position``.

        Verification adds one token of its own, so the draft may take all but one of those that are still wanted.

        Args:
            params: Its sampling parameters, or None.
            outputs: How many tokens it has generated.
            token: The newest of them.
            position: Of that token.
            longest: The longest draft that is wanted of anyone.
        """
        if not self.wish(params).drafts or self.over(params, outputs, token):
            return 0
        wanted = self.max_model_len - 1 - position
        if params is not None and params.max_tokens is not None:
            wanted = min(wanted, params.max_tokens - outputs)
        return max(0, min(longest, wanted - 1))

    @staticmethod
    def over(params: Any, outputs: int, token: int) -> bool:
        """Return whether a request ends with its newest token, stop strings apart; arguments as for ``limit``."""
        if params is None:
            return False
        if params.max_tokens is not None and outputs >= params.max_tokens:
            return True
        return outputs >= params.min_tokens and token in (params.eos_token_id, *(params.stop_token_ids or ()))

    def wish(self, params: Any, *, early: bool = True) -> Wish:
        """Return what a request asks for, by its sampling parameters or None; lossless decoding if ``early`` is not."""
        asked = wish_of(None if params is None else params.extra_args, self.config)
        return LOSSLESS if asked.early and not early else asked

    def learn(self, batch: Sequence[Verified], requests: Sequence[object]) -> None:
        """Tell the policy what became of the last round's drafts, and whether there was nothing but that round.

        Args:
            batch: Of every sequence that has sampled.
            requests: Of every sequence of the batch.
        """
        last_round, self._verifying = self._verifying, None
        known = [last_round is not None and id(request) in last_round.rows for request in requests]
        if not any(known):
            self.drafter.policy.interrupt()
        elif not all(known):
            self.drafter.policy.note_prompts()
        if last_round is None:
            return
        for one in batch:
            found = last_round.rows.get(id(one.request))
            if found is None:
                continue
            if one.drafted:
                self.drafter.policy.learn(found, one.drafted, one.accepted)
            if self.config.exits_early and last_round.sampled[found].wish.early:
                kept = {n: left for n, left in last_round.frontier.left(found).items() if n < one.accepted}
                self.drafter.early.emitted([*kept.values()], one.accepted + 1 - len(kept))
                self._left_now[one.req_id] = {n: self.config.exit_layers[left.cut] for n, left in kept.items()}

    def tell(self, output: Any) -> None:
        """Attach to a step's output which of its tokens have left; see ``responses``."""
        left, self._left_now = self._left_now, {}
        responses.attach(output, responses.LEFT, left)

    @contextmanager
    def _kv_context(
        self, runner: Runner, blocks: Blocks, counts: torch.Tensor | None, at: torch.Tensor, *, kept: bool = True
    ) -> Iterator[torch.Tensor]:
        """A forward context of some tokens of some sequences, KV going to the target's own blocks.

        What it needs to know of them is on the host already, so that it does not wait for the device.

        Args:
            runner: What is known of the model runner.
            blocks: Of the sequences.
            counts: Tokens of each sequence, int64 [n], on the host; None for one each.
            at: Positions of the tokens, rising within a sequence, int64 [counts.sum()], on the host.
            kept: Whether the tokens' own KV is.

        Yields:
            The positions, on the runner's device.
        """
        num_tokens, positions = len(at), at.to(runner.device)
        if counts is None:
            n, most = num_tokens, 1
            starts = torch.arange(n + 1, dtype=torch.int32)
            seq_lens_cpu = (at + 1).to(torch.int32)
        else:
            n, most = len(counts), int(counts.max())
            ends = counts.cumsum(0)
            starts = torch.zeros(n + 1, dtype=torch.int32)
            starts[1:] = ends
            seq_lens_cpu = (at[ends - 1] + 1).to(torch.int32)
        seq_lens, each = seq_lens_cpu.to(runner.device), None if counts is None else counts.to(runner.device)
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for number, attn_groups in enumerate(runner.attn_groups):
            table = blocks[number]
            if each is not None:
                table = table.repeat_interleave(each, dim=0, output_size=num_tokens)
            slot_mapping = slots_of(table, positions, runner.block_sizes[number])
            if not kept:
                slot_mapping.fill_(NO_SLOT)
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
            self.drafter.passes.drafting()
            yield positions


def how_it_runs(config: CompilationConfig, replays: bool = False) -> str:
    """Return a sentence on which parts of serving are compiled, and which run in CUDA graphs.

    Args:
        config: vLLM's.
        replays: Whether drafting replays graphs.
    """
    compiled = "eager" if config.mode in (None, CompilationMode.NONE) else "compiled"
    ours = f"draft steps, resumed verification and fill-in run {compiled}"
    if config.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return f"{ours}; nothing runs in CUDA graphs"
    where = "in PIECEWISE CUDA graphs" if replays else "outside CUDA graphs"
    return f"{ours}, {where}; vLLM's own steps run in {config.cudagraph_mode.name} graphs"


def slots_of(blocks: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the KV slots of positions, int64 [n].

    Args:
        blocks: Block ids of each position's sequence, [n, max_blocks].
        positions: int64 [n].
        block_size: Tokens per block.
    """
    block_ids = blocks.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    return block_ids.to(torch.int64) * block_size + positions % block_size


def adapter_of(runner: Any) -> Any:
    """Return the proposer or speculator of a model runner that serves self-exit."""
    return runner.drafter if hasattr(runner, "drafter") else runner.speculator


def measure(worker: Any) -> None:
    """Let a worker's adapter measure; for vLLM's ``collective_rpc``."""
    adapter_of(worker.model_runner).measure(worker.model_runner)
