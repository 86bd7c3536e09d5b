"""Drafting with the first segment and an exit head; free of model runners."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.counters import SILENT_TOKENS, Counters
from vllm_earlyexit.engine.early_exit import NEVER, EarlyExits, Left
from vllm_earlyexit.engine.fill_in import FillIn
from vllm_earlyexit.engine.frontier import Frontier, of_rows
from vllm_earlyexit.engine.head import ABSENT, Asked, CompiledExit, DraftVocab, Head, SharedExit
from vllm_earlyexit.engine.lookup import Repeat
from vllm_earlyexit.engine.models import Segment, residual_stream, run_segments
from vllm_earlyexit.engine.policy import Decision, Policy, RowLimits, build_policy
from vllm_earlyexit.engine.ranks import agreed
from vllm_earlyexit.engine.sizes import Passes
from vllm_earlyexit.heads.checkpoint import load_heads

logger = init_logger("vllm.earlyexit")

SILENT = 64
"""Tokens about which heads say nothing, because their logits are not numbers, until they are not asked any more."""

KVContext = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], AbstractContextManager[torch.Tensor]]
"""Given some of a round's rows, rising, int64 [n]; how many tokens of each, int64 [n] on the host (None for one); and
the positions of all these tokens, int64 [num_tokens] on the host: a forward context of them that yields the positions
on the model's device."""


HeadSampler = Callable[[Sequence[int], torch.Tensor, Sequence[Sequence[int]]], torch.Tensor]
"""From some of a round's rows, a head's logits for each, float32 [n, vocab_size], and what is drafted for each so far,
to the tokens that these requests sample from such logits, int64 [n]."""


@dataclass(frozen=True)
class Leaving:
    """How tokens of a round may leave early.

    Attributes:
        limits: Of each sequence, up to which entropy; None for those that decode losslessly.
        greedy: Which sequences take a head's first choice.
        sample: For the others.
    """

    limits: RowLimits
    greedy: Sequence[bool]
    sample: HeadSampler

    def final(self, rows: torch.Tensor, entropy: torch.Tensor, cut: int, position: int) -> torch.Tensor:
        """Return whose tokens leave, bool [n].

        Args:
            rows: The sequences, int64 [n].
            entropy: Of their heads' choices, in nats, [n].
            cut: The exit.
            position: Their draft position.
        """
        asked = [self.limits[row] for row in rows.tolist()]
        limits = [NEVER if limit is None else limit.at(cut, position) for limit in asked]
        return entropy <= torch.tensor(limits, device=entropy.device)


@dataclass(frozen=True)
class Drawing:
    """How requests that sample draft: they draw from a head with the random numbers that verification will use.

    What is drafted then agrees with what the full model samples with a probability of at least (1 - d) / (1 + d), d
    being the total variation distance of head and model (Gumbel sampling, Daliri et al. 2024, arXiv:2408.07978); a
    head's first choice agrees as often as the model samples that. What is sampled is the same.

    Attributes:
        draws: Which sequences do.
        draw: From some of these, the positions of their newest tokens, int64 [n], and what a head says about them,
            float32 [n, vocab_size], to tokens, int64 [n].
    """

    draws: Sequence[bool]
    draw: Callable[[Sequence[int], torch.Tensor, torch.Tensor], torch.Tensor]

    def instead(self, rows: Sequence[int], positions: torch.Tensor, asked: Asked, head: Head) -> Asked:
        """Return what a head says about some sequences, with tokens drawn for those that draw."""
        at = [n for n, row in enumerate(rows) if self.draws[row]]
        if not at:
            return asked
        index = torch.tensor(at, device=asked.token_ids.device)
        tokens = self.draw([rows[n] for n in at], positions[index], head.logits(asked.features[index]))
        return asked._replace(token_ids=asked.token_ids.index_copy(0, index, tokens))


@dataclass(frozen=True)
class Pending:
    """What of a batch is pending.

    Attributes:
        states: Hidden states of the pending tokens, at their cuts, by name, each [num_pending, hidden_size].
        passed: How many segments each of the batch's num_tokens tokens has passed: none, if it is not pending. Within a
            sequence it never rises.
        skipping: Indices into the batch of pending tokens that skip the layers above: the first ones of their
            sequences, behind which there are others.
    """

    states: dict[str, torch.Tensor]
    passed: Sequence[int]
    skipping: Sequence[int] = ()


@dataclass(frozen=True)
class Unseen:
    """A draft step that was run before anyone looked at what the one before it has drafted.

    Attributes:
        rows: The sequences.
        at_cut: Their newest tokens' hidden states, by name, each [n, hidden_size].
        asked: What the head says about these.
    """

    rows: Sequence[int]
    at_cut: Mapping[str, torch.Tensor]
    asked: Asked


@dataclass
class Exit:
    """One exit that can be drafted from.

    Attributes:
        head: Asked for tokens.
        below: The segments up to the cut.
        above: The segments from there on.
    """

    head: Head
    below: Sequence[Segment]
    above: Sequence[Segment]


def _left(
    rows: torch.Tensor,
    asked: Asked,
    cut: int,
    position: int,
    keep: torch.Tensor,
    final: torch.Tensor | None,
    leaving: Leaving | None,
) -> dict[int, Left]:
    """Return which of some sequences' tokens leave."""
    if leaving is None or final is None:
        return {}
    found, gone = {}, keep & final
    for row, entropy in zip(rows[gone].tolist(), asked.entropy[gone].tolist(), strict=True):
        limits = leaving.limits[row]
        assert limits is not None
        found[row] = Left(cut, limits.accuracy, sure=entropy <= limits.at(cut, position))
    return found


class SelfExitDrafter:
    """Drafts tokens for a batch of sequences, each until its policy or its limit says stop, and verifies them.

    Args:
        model: The loaded exit-headed vLLM model; its forward runs the drafter's segments from here on.
        config: The resolved setting.
        vllm_config: vLLM's.
    """

    def __init__(self, model: Any, config: EarlyExitConfig, vllm_config: VllmConfig):
        self._model = model
        self.passes: Passes = model.passes
        segments = model.cut(config.exit_layers)
        if config.heads is None:
            heads: list[Head] = [SharedExit(model)]
            self.policy: Policy = build_policy(config, [])
            self.early = EarlyExits(config, [])
        else:
            found = load_heads(Path(config.heads))
            layers = config.exit_layers
            vocab = DraftVocab.of(vllm_config, model, found.draft_vocab)
            heads = [CompiledExit(vllm_config, model, layer, found.modules[layer], vocab) for layer in layers]
            of_exits = [found.config.exit(layer) for layer in layers]
            self.policy = build_policy(config, of_exits)
            calibrations = [one.calibration for one in of_exits]
            self.early = EarlyExits(config, [() if one is None else one.positions for one in calibrations])
        self._prompt_lookup = config.prompt_lookup
        self.silent = 0
        """Tokens about which a head's logits were not numbers."""
        self._counters = Counters(config.counters)
        self.exits = [Exit(head, segments[: n + 1], segments[n + 1 :]) for n, head in enumerate(heads)]
        self._segments = segments
        cuts = {n: segment.start for n, segment in enumerate(segments) if n and config.fill_in == "propagate"}
        self.fill_ins = {passed: FillIn(vllm_config, model, layer) for passed, layer in cuts.items()}
        """By how many segments tokens have passed; none if nothing is propagated."""
        self.looks_ahead = vllm_config.device_config.device_type != "cpu"
        """Whether steps are run without a look at what they have drafted, as many as are expected to pay."""

    def starts(self, num_seqs: int, context: int) -> bool:
        """Start a round over so many sequences, of so many tokens each; return whether to ``draft`` for them."""
        return agreed(lambda: self.policy.start(num_seqs, context))

    def draft(
        self,
        frontier: Frontier,
        previous: Callable[[], torch.Tensor],
        kv_context: KVContext,
        repeat: Callable[[int, Sequence[int]], Repeat],
        leaving: Leaving | None = None,
        drawing: Drawing | None = None,
    ) -> list[list[int]]:
        """Draft until every sequence of a round that has started has stopped; return the drafted tokens of each.

        Args:
            frontier: The sequences, each at its newest token; afterwards it holds what is pending.
            previous: Makes a copy of the full model's final hidden states of the tokens before these,
                [num_seqs, hidden_size]; called if a head is asked.
            kv_context: Where a step's KV is.
            repeat: From a row and tokens drafted for it to what followed when these and the newest tokens before them
                last occurred in the sequence.
            leaving: How tokens may leave early; None if none may.
            drawing: How requests that sample draft; None if all draft a head's first choice.
        """
        limits = () if leaving is None else leaving.limits
        found: list[Repeat] = []

        def lookup() -> list[Repeat]:
            if self._prompt_lookup:
                drafts = enumerate(frontier.drafts())
                found[:] = [found[row] if found and not draft else repeat(row, draft) for row, draft in drafts]
            return found

        def copies(counts: Mapping[int, int]) -> dict[int, Sequence[int]]:
            return {row: found[row].tokens[:count] for row, count in counts.items()}

        def begin() -> tuple[bool, int, dict[int, Sequence[int]], int]:
            ask = self.policy.begin(lookup, limits) and self.silent < SILENT
            copied = self.policy.copied
            far = ask and self.looks_ahead and leaving is None
            ahead = self.policy.ahead(frontier.num_seqs - len(copied)) if far else 1
            return ask, self.policy.exit, copies(copied), ahead

        ask, exit_, copied, ahead = agreed(begin)
        frontier.copy(copied)
        if ask:
            if ahead > 1:
                self._ask_ahead(frontier, exit_, previous(), kv_context, ahead, drawing)
            else:
                self._ask(frontier, exit_, previous(), kv_context, leaving, drawing)
            frontier.copy(agreed(lambda: copies(self.policy.append(lookup))))
        return frontier.drafts()

    def _ask(
        self,
        frontier: Frontier,
        exit_: int,
        previous: torch.Tensor,
        kv_context: KVContext,
        leaving: Leaving | None,
        drawing: Drawing | None,
    ) -> None:
        """Draft from an exit, and perhaps later ones, until every sequence has stopped; arguments as above."""
        for position in itertools.count():
            if (step := frontier.step) is None:
                break
            cut, before, left = exit_, of_rows(previous, step.rows), dict[int, Left]()
            with kv_context(step.rows, None, step.positions) as positions:
                at_cut, asked = self._step(cut, frontier.drafting, step.input_ids, positions, before, drawing)
            frontier.keep(at_cut.tensors, cut)
            asked, final = self._leave(step.rows, asked, cut, position, frontier, leaving)
            tokens, decision = self._decide(step.rows, asked, cut, final)
            left |= _left(step.rows, asked, cut, position, decision.keep, final, leaving)
            features, keep = asked.features, decision.keep
            unsure = None
            while decision.deeper is not None and bool(decision.deeper.any()):
                deeper = decision.deeper.nonzero().squeeze(-1)
                unsure = deeper if unsure is None else unsure[deeper]
                asked = self._lift(frontier, step.rows[unsure], cut, before[unsure], kv_context)
                cut += 1
                if drawing is not None:
                    rows = step.rows[unsure].tolist()
                    asked = drawing.instead(rows, positions[unsure], asked, self.exits[cut].head)
                asked, final = self._leave(step.rows[unsure], asked, cut, position, frontier, leaving)
                instead, decision = self._decide(step.rows[unsure], asked, cut, final)
                left |= _left(step.rows[unsure], asked, cut, position, decision.keep, final, leaving)
                features = features.index_copy(0, unsure, asked.features)
                tokens = tokens.index_copy(0, unsure, instead)
                keep = keep.index_copy(0, unsure, decision.keep)
            previous.index_copy_(0, step.rows, features)
            frontier.advance(tokens, keep, left)
            if not decision.go_on:
                break

    def _step(
        self,
        cut: int,
        rows: Sequence[int],
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        before: torch.Tensor,
        drawing: Drawing | None,
    ) -> tuple[IntermediateTensors, Asked]:
        """Feed tokens of some sequences through the layers below a cut and ask the head there; shapes as in ``Head``.

        What the head says is what these sequences draft: drawn, for those that draw.
        """
        head = self.exits[cut].head
        at_cut = run_segments(self.exits[cut].below, input_ids, positions)
        assert isinstance(at_cut, IntermediateTensors)
        asked = head(residual_stream(at_cut), positions, before)
        return at_cut, asked if drawing is None else drawing.instead(rows, positions, asked, head)

    def _ask_ahead(
        self,
        frontier: Frontier,
        cut: int,
        previous: torch.Tensor,
        kv_context: KVContext,
        count: int,
        drawing: Drawing | None,
    ) -> None:
        """Draft from an exit, ``count`` steps until the first look; other arguments as in ``draft``.

        A look waits for the device. Between two looks sequences draft on that have stopped; what they draft then is
        thrown away, and what it has written to a sequence's own slots is overwritten when the slots are due.
        """
        while self._look(frontier, cut, previous, self._run_ahead(frontier, cut, previous, kv_context, count, drawing)):
            count = agreed(lambda: self.policy.ahead(len(frontier.drafting)))

    def _run_ahead(
        self,
        frontier: Frontier,
        cut: int,
        previous: torch.Tensor,
        kv_context: KVContext,
        count: int,
        drawing: Drawing | None,
    ) -> list[Unseen]:
        """Run up to ``count`` draft steps in a row; none if nobody drafts."""
        if (step := frontier.step) is None:
            return []
        last, ids, before, ran = frontier.drafting, step.input_ids, of_rows(previous, step.rows), list[Unseen]()
        for rows, on_host in frontier.ahead(count):
            if len(rows) < len(last):
                going = torch.tensor([last.index(row) for row in rows], device=ids.device)
                ids, before = ids[going], before[going]
            on = step.rows if len(rows) == len(step.rows) else torch.tensor(rows, device=ids.device)
            with kv_context(on, None, on_host) as positions:
                at_cut, asked = self._step(cut, rows, ids, positions, before, drawing)
            ran.append(Unseen(rows, at_cut.tensors, asked))
            last, ids, before = rows, asked.token_ids.to(ids.dtype), asked.features
        return ran

    def _look(self, frontier: Frontier, cut: int, previous: torch.Tensor, ran: Sequence[Unseen]) -> bool:
        """Decide on what draft steps in a row have drafted, step by step; return whether to go on."""
        if not ran:
            return False
        sizes, going = [len(one.rows) for one in ran], False
        said = [torch.cat([one.asked.token_ids.double() for one in ran]), torch.cat([one.asked.entropy for one in ran])]
        token_ids, entropy = torch.stack(said).cpu()  # the only wait
        for one, ids, unsure in zip(ran, token_ids.long().split(sizes), entropy.float().split(sizes), strict=True):
            rows, device = frontier.drafting, one.asked.features.device
            if not rows:
                return False
            at = torch.tensor([one.rows.index(row) for row in rows])
            seen = Asked(one.asked.features, ids[at], unsure[at])
            tokens, decision = self._decide(torch.tensor(rows), seen, cut, None, lift=False)
            index = at.to(device)
            frontier.keep({name: of_rows(states, index) for name, states in one.at_cut.items()}, cut)
            previous.index_copy_(0, torch.tensor(rows, device=device), of_rows(seen.features, index))
            frontier.advance(tokens, decision.keep)
            going = decision.go_on
        return going and bool(frontier.drafting)

    def _leave(
        self, rows: torch.Tensor, asked: Asked, cut: int, position: int, frontier: Frontier, leaving: Leaving | None
    ) -> tuple[Asked, torch.Tensor | None]:
        """Return what a head says after requests that leave have sampled from it, and who leaves, bool [n], if any may.

        A token that a head does not know cannot leave.
        """
        if leaving is None:
            return asked, None
        final = agreed(lambda: leaving.final(rows, asked.entropy, cut, position))
        who = rows.tolist()
        at = [n for n, leaves in enumerate(final.tolist()) if leaves and not leaving.greedy[who[n]]]
        if not at:
            return asked, final
        index, drafts = torch.tensor(at, device=final.device), frontier.drafts()
        logits = self.exits[cut].head.logits(asked.features[index])
        tokens = leaving.sample([who[n] for n in at], logits, [drafts[who[n]] for n in at])
        known = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) > ABSENT
        tokens = torch.where(known, tokens, asked.token_ids[index])
        return asked._replace(token_ids=asked.token_ids.index_copy(0, index, tokens)), final.index_copy(0, index, known)

    def _decide(
        self, rows: torch.Tensor, asked: Asked, cut: int, final: torch.Tensor | None, lift: bool = True
    ) -> tuple[torch.Tensor, Decision]:
        """Return what is drafted for some sequences after a head was asked, int64 [n], and what to do with it."""

        def decide() -> tuple[torch.Tensor, Decision]:
            decision = self.policy.decide(rows, asked.entropy, cut, final, lift)
            return asked.token_ids, replace(decision, keep=decision.keep & self._said(asked))

        return agreed(decide)

    def _said(self, asked: Asked) -> torch.Tensor:
        """Return of which tokens a head said something, bool [n]; where its logits are not numbers, drafts end."""
        said = ~asked.entropy.isnan()
        silent = len(said) - int(said.sum())
        if silent and not self.silent:
            logger.warning(
                "self-exit: an exit head's logits are not numbers; nothing is drafted where that is so, and after %d "
                "such tokens no head is asked any more",
                SILENT,
            )
        if silent:
            self.silent += silent
            self._counters.add(SILENT_TOKENS, silent)
        return said

    def _lift(
        self, frontier: Frontier, rows: torch.Tensor, cut: int, before: torch.Tensor, kv_context: KVContext
    ) -> Asked:
        """Take what is pending at ``cut`` of ``rows`` on to the next one; ask the head there about the newest tokens.

        Args:
            frontier: What is pending.
            rows: The sequences, int64 [n].
            cut: Where they stand.
            before: What the head is told of the tokens before the newest ones, [n, hidden_size].
            kv_context: Where KV is.
        """
        standing = frontier.standing(rows.tolist(), cut)
        with kv_context(rows, standing.counts, standing.positions) as positions:
            state = IntermediateTensors(standing.states)
            lifted = self.exits[cut + 1].below[-1](None, positions, state)
        assert isinstance(lifted, IntermediateTensors)
        frontier.lift(standing, lifted.tensors, cut + 1)
        newest = standing.newest.to(positions.device)
        with kv_context(rows, None, standing.positions[standing.newest]) as positions:
            return self.exits[cut + 1].head(residual_stream(lifted)[newest], positions, before)

    def verify(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        pending: Pending,
        context: Callable[[Sequence[int]], AbstractContextManager[None]],
    ) -> torch.Tensor:
        """Run a batch through the model, resuming pending tokens at the cuts where they stand.

        The forward context must be that of the whole batch.

        Args:
            input_ids: int32 [num_tokens].
            positions: int64 [num_tokens].
            pending: Which tokens are pending; the others are fed from the bottom.
            context: From indices into the batch, rising, to a forward context of these tokens: of each sequence that
                has any, its last ones.

        Returns:
            Hidden states after the final norm, [num_tokens, hidden_size]; zeros for tokens that skip layers.
        """
        if pending.skipping:
            return self._verify_others(input_ids, positions, pending, context)
        if not any(pending.passed):
            whole = run_segments(self._segments, input_ids, positions)
            assert isinstance(whole, torch.Tensor)
            return whole
        joined, at = pending.states, [n for n, passed in enumerate(pending.passed) if passed]
        if len(at) < len(positions):
            places = torch.tensor(at, device=positions.device)
            joined = {
                name: states.new_empty(len(positions), *states.shape[1:]).index_copy_(0, places, states)
                for name, states in pending.states.items()
            }
        joins = sorted({*pending.passed})
        for start, end in pairwise(joins):
            low = [n for n, passed in enumerate(pending.passed) if passed <= start]
            index = torch.tensor(low, device=positions.device)
            below = None if start == 0 else IntermediateTensors({name: s[index] for name, s in joined.items()})
            with context(low):
                at_cut = run_segments(self._segments[start:end], input_ids[index], positions[index], below)
            assert isinstance(at_cut, IntermediateTensors)
            for name, states in at_cut.tensors.items():
                joined[name].index_copy_(0, index, states)
        final = run_segments(self._segments[joins[-1] :], None, positions, IntermediateTensors(joined))
        assert isinstance(final, torch.Tensor)
        return final

    def _verify_others(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        pending: Pending,
        context: Callable[[Sequence[int]], AbstractContextManager[None]],
    ) -> torch.Tensor:
        """Fill in the KV of tokens that skip layers, then verify the others; see ``verify``."""
        skipping = set(pending.skipping)
        others = [n for n in range(len(positions)) if n not in skipping]
        standing = [n for n, passed in enumerate(pending.passed) if passed]
        for passed in sorted({pending.passed[n] for n in skipping}):
            filled = [n for n in pending.skipping if pending.passed[n] == passed]
            kept = torch.tensor([standing.index(n) for n in filled], device=positions.device)
            state = IntermediateTensors({name: states[kept] for name, states in pending.states.items()})
            with context(filled):
                self.fill_ins[passed](residual_stream(state), positions[filled])
        left = [at for at, n in enumerate(standing) if n not in skipping]
        kept = torch.tensor(left, dtype=torch.int64, device=positions.device)
        rest = Pending(
            {name: states[kept] for name, states in pending.states.items()}, [pending.passed[n] for n in others]
        )
        index = torch.tensor(others, device=positions.device)
        with context(others):
            final = self.verify(input_ids[index], positions[index], rest, lambda low: context([others[n] for n in low]))
        return final.new_zeros(len(positions), *final.shape[1:]).index_copy_(0, index, final)

    def timed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> list[float]:
        """Run every part of a step over [n] tokens in their forward context; return the seconds of ``PartTimes``.

        Args:
            input_ids: int32 [n].
            positions: int64 [n].
        """
        times = [self._now(input_ids)]
        state: IntermediateTensors | None = None
        for drafted_from in self.exits:
            at_cut = drafted_from.below[-1](input_ids, positions, state)
            times.append(self._now(input_ids))
            assert isinstance(at_cut, IntermediateTensors)
            state = at_cut
            hidden = residual_stream(state)
            asked = drafted_from.head(hidden, positions, hidden.clone())  # compiled for one tensor, it would stay so
            asked.entropy.tolist()
            asked.token_ids.tolist()
            times.append(self._now(input_ids))
        self._model.compute_logits(run_segments(self.exits[-1].above, None, positions, state)).max(dim=-1)
        times.append(self._now(input_ids))
        self._model.compute_logits(self._model(input_ids, positions)).max(dim=-1)
        times.append(self._now(input_ids))
        return [after - before for before, after in pairwise(times)]

    @staticmethod
    def _now(like: torch.Tensor) -> float:
        if like.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
