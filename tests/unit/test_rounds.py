"""Between a round of drafting and the next forward pass anything may happen to requests; see the slow model below."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.drafter import Pending
from vllm_earlyexit.engine.frontier import Frontier
from vllm_earlyexit.engine.rounds import Round, Sampled, how_it_runs
from vllm_earlyexit.engine.runner_v1 import SelfExitProposer

LONGEST, VOCAB, LENGTH = 4, 3, 24


@dataclass(eq=False)
class Request:
    """Known by its number, which nobody else ever has; its name may come back."""

    number: int
    name: str
    tokens: list[int]
    computed: int = 0
    draft: list[int] = field(default_factory=list)


class Engine:
    """A proposer over a runner that has nothing but what the proposer reads, and the slow model beside it.

    The slow model: a token is pending if in the round just before this same request drafted it, or drafted from it, at
    this position, and every pending token of that request before it is fed as well.
    """

    def __init__(self, data: st.DataObject):
        self.data, self.made = data, 0
        self.live: list[Request] = []
        self.pending: dict[tuple[int, int, int], int] = {}
        self.verified: Pending | None = None
        self.proposer = SelfExitProposer.__new__(SelfExitProposer)
        self.proposer.config = EarlyExitConfig(None, (1,), LONGEST, "fixed")
        self.proposer._round = self.proposer._verifying = None
        self.proposer.drafter = SimpleNamespace(verify=self.verify)  # type: ignore[assignment]
        self.resumed = 0

    def verify(self, input_ids: Any, positions: Any, pending: Pending, context: Any) -> torch.Tensor:
        self.verified = pending
        return torch.zeros(len(positions), 1)

    def arrive(self) -> None:
        name = self.data.draw(st.sampled_from("abcd"))
        if all(request.name != name for request in self.live):
            tokens = self.data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
            self.live.append(Request(self.made, name, tokens))
            self.made += 1

    def leave(self) -> None:
        if self.live:
            self.live.remove(self.data.draw(st.sampled_from(self.live)))

    def preempt(self) -> None:
        if self.live:
            victim = self.data.draw(st.sampled_from(self.live))
            victim.computed, victim.draft = 0, []

    def step(self) -> None:
        """Schedule some requests in any order, some tokens each; verify; sample; draft."""
        batch = self.data.draw(st.permutations(self.live))
        batch = [request for request in batch if self.data.draw(st.booleans())]
        fed: list[list[int]] = []
        for request in batch:
            request.draft = request.draft[: self.data.draw(st.integers(0, LONGEST))]  # trimmed
            if request.draft and self.data.draw(st.integers(0, 3)) == 0:  # somebody else drafts for it
                request.draft[-1] = self.data.draw(st.integers(0, VOCAB - 1))
            there = [*request.tokens[request.computed :], *request.draft]
            fed.append(there[: self.data.draw(st.integers(1, len(there)))])
        if not batch:
            return
        runner = self.runner(batch, fed)
        positions = torch.tensor(
            [r.computed + n for r, tokens in zip(batch, fed, strict=True) for n in range(len(tokens))]
        )
        self.verified = None
        self.proposer.forward(runner, torch.tensor([token for tokens in fed for token in tokens]), positions)
        self.check(batch, fed)
        self.sample_and_draft(batch, fed)

    def runner(self, batch: list[Request], fed: list[list[int]]) -> Any:
        table = np.zeros((len(batch), LENGTH + LONGEST), dtype=np.int32)
        for row, (request, tokens) in enumerate(zip(batch, fed, strict=True)):
            table[row, : request.computed] = request.tokens[: request.computed]
            table[row, request.computed : request.computed + len(tokens)] = tokens
        input_batch = SimpleNamespace(
            num_reqs=len(batch),
            req_ids=[request.name for request in batch],
            num_computed_tokens_cpu=np.array([request.computed for request in batch]),
            token_ids_cpu=table,
        )
        edges = np.cumsum([0, *map(len, fed)])
        requests = {request.name: request for request in self.live}
        return SimpleNamespace(
            input_batch=input_batch,
            requests=requests,
            query_start_loc=SimpleNamespace(np=edges),
            lora_config=None,
            device="cpu",
            attn_groups=[],
        )

    def check(self, batch: list[Request], fed: list[list[int]]) -> None:
        expected, states = [], []
        for request, tokens in zip(batch, fed, strict=True):
            before = True
            for n, token in enumerate(tokens):
                key = (request.number, request.computed + n, token)
                at = self.pending.get(key) if before and (n or self.starts(request)) else None
                before = at is not None
                expected.append(0 if at is None else 1 + at)
                if at is not None:
                    states.append([*key, at])
        assert (self.verified is not None) == bool(states)
        if self.verified is not None:
            assert list(self.verified.passed) == expected
            assert self.verified.states["hidden"].tolist() == states
            self.resumed += 1

    def starts(self, request: Request) -> bool:
        """Whether the first token that is fed is the first that is pending."""
        return request.computed == min((at for number, at, _ in self.pending if number == request.number), default=-1)

    def sample_and_draft(self, batch: list[Request], fed: list[list[int]]) -> None:
        self.pending = {}
        drafting = []
        for request, tokens in zip(batch, fed, strict=True):
            known = len(request.tokens) - request.computed
            if len(tokens) < known:  # a part of the prompt, or of what is computed anew
                request.computed += len(tokens)
                continue
            accepted = self.data.draw(st.integers(0, len(tokens) - known))
            request.tokens += [*tokens[known : known + accepted], self.data.draw(st.integers(0, VOCAB - 1))]
            request.computed, request.draft = len(request.tokens) - 1, []
            if len(request.tokens) < LENGTH:
                drafting.append(request)
            else:
                self.live.remove(request)
        if not drafting:
            return
        places = [len(request.tokens) - 1 for request in drafting]
        limits = [self.data.draw(st.integers(0, LONGEST)) for _ in drafting]
        frontier = Frontier([r.tokens[-1] for r in drafting], places, limits, "cpu")
        while (step := frontier.step) is not None:
            fields = zip(step.rows.tolist(), step.positions.tolist(), step.input_ids.tolist(), strict=True)
            each = [(drafting[row].number, position, token) for row, position, token in fields]
            frontier.keep({"hidden": torch.tensor([[*key, 0] for key in each])}, cut=0)
            self.pending |= dict.fromkeys(each, 0)
            keep = [self.data.draw(st.booleans()) for _ in each]
            said = [self.data.draw(st.integers(0, VOCAB - 1)) for _ in each]
            frontier.advance(torch.tensor(said), torch.tensor(keep))
        for request, draft in zip(drafting, frontier.drafts(), strict=True):
            request.draft = draft
        each_row = enumerate(zip(drafting, places, limits, strict=True))
        sampled = [Sampled(row, request.tokens[-1], place, limit) for row, (request, place, limit) in each_row]
        self.proposer._round = Round(frontier, drafting, sampled)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_only_what_the_round_before_left_is_resumed(data: st.DataObject):
    engine = Engine(data)
    engine.arrive()
    for _ in range(data.draw(st.integers(5, 15))):
        what = data.draw(st.sampled_from([engine.step] * 6 + [engine.arrive, engine.leave, engine.preempt]))
        what()


def test_the_log_says_what_is_compiled_and_what_runs_in_graphs():
    on_cpu = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE)
    assert how_it_runs(on_cpu).endswith("run eager; nothing runs in CUDA graphs")
    on_gpu = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    assert "compiled, outside CUDA graphs" in how_it_runs(on_gpu)
    assert "compiled, in PIECEWISE CUDA graphs" in how_it_runs(on_gpu, replays=True)
    assert "FULL_AND_PIECEWISE" in how_it_runs(on_gpu)


def test_the_fuzzing_resumes_something():
    """The test above would be empty if random events left nothing pending."""
    resumed = []

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def soaked(data: st.DataObject) -> None:
        engine = Engine(data)
        engine.arrive()
        for _ in range(10):
            engine.step()
        resumed.append(engine.resumed)

    soaked()
    assert sum(count > 0 for count in resumed) > 5
