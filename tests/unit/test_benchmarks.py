"""The benchmarks' own arithmetic."""

import time
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import draws, quality
from benchmarks.cascade import Request, World
from benchmarks.engines import Run, Setup, family, speculative_config
from benchmarks.oracle import Oracle
from benchmarks.quality import families
from benchmarks.roofline import H100, SHAPES, best, speedup
from benchmarks.throughput import Contestant, early_exits, record, spread, turns
from tests.unit.helpers import LAYERS, make_model
from vllm_earlyexit.engine.cost import StepTimes
from vllm_earlyexit.engine.early_exit import Limits
from vllm_earlyexit.engine.head import Asked

SETUP = Setup("model", "heads", "bfloat16", True, 8, 4, 64)


def test_a_record_compares_each_repeat_with_plain_decoding_of_the_same_repeat():
    plain = [Run(2.0, [[1, 2], [3, 4]]), Run(4.0, [[1, 2], [3, 4]]), Run(1.0, [[1, 2], [3, 4]])]
    ours = [
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[2, 0]),
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[1, 1]),
        Run(1.0, [[1, 2], [3, 5]], drafts=2, drafted=2, accepted=1, accepted_at=[1, 0]),
    ]
    alone = Run(1.0, [[1, 2], [3, 6]])
    found = record(SETUP, Path("dir/prompts.jsonl"), "self-exit", 2, ours, plain, alone)
    assert found["speedup_vs_ar"] == 2.0  # the median of 2, 4 and 1
    assert found["tokens_per_s"] == 4.0
    assert found["ms_per_token"] == 250.0
    assert found["acceptance_rate"] == 0.5
    assert found["acceptance_length"] == round(1 + 5 / 8, 3)
    assert found["accepted_at"] == [4, 1]
    assert found["identical_outputs"] == 1
    assert found["repeats"] == [4.0, 4.0, 4.0]
    assert found["identical_to_plain_at_smallest_concurrency"] == 1
    assert record(SETUP, Path("p"), "ar", 2, plain, None, plain[0])["speedup_vs_ar"] is None


def test_the_oracle_lets_leave_what_plain_decoding_says_as_well():
    """Three sequences: one that has gone the way of plain decoding, one that has not, one that decodes losslessly."""
    asked = Asked(torch.zeros(3, 1), torch.tensor([7, 7, 7]), torch.zeros(3))
    drafter = SimpleNamespace(_leave=None)
    adapter = SimpleNamespace(
        draft=lambda *_: drafter._leave(torch.arange(3), asked, 0, 0, frontier, leaving), drafter=drafter
    )
    oracle = Oracle(adapter)
    oracle.known = {"a": [1, 2, 7, 7], "b": [1, 2, 7], "c": [1, 2, 7]}
    said = {"a": [1], "b": [3], "c": [1]}
    requests = [SimpleNamespace(req_id=name, output_token_ids=said[name]) for name in "abc"]
    frontier = SimpleNamespace(draft=lambda row: [2])
    leaving = SimpleNamespace(limits=[Limits(((1.0,),)), Limits(((1.0,),)), None])
    assert adapter.draft(None, requests, None)[1].tolist() == [True, False, False]
    asked.token_ids[0] = 8
    assert not adapter.draft(None, requests, None)[1].any()


def test_early_exits_are_reported_with_the_mean_layer_that_decided(tmp_path: Path):
    setup = Setup(str(make_model(tmp_path / "model")), None, "bfloat16", True, 8, 4, 64)
    early = {"early_tokens": 30, "early_tokens_1": 20, "early_tokens_2": 10, "full_depth_tokens": 10}
    checked = {"checked_tokens": 8, "agreed_tokens": 6, "promised_tokens": 7.2}
    found = early_exits(Run(1.0, [], early=early | checked | {"involuntary_early_tokens": 3}), setup)
    depth = (20 * 1 + 10 * 2 + 10 * LAYERS) / 40
    told = {"early": 0.75, "involuntary": 3, "mean_exit_depth": depth, "agreement": 0.75, "promised": 0.9}
    assert found == told
    assert early_exits(Run(1.0, []), setup) is None


def test_configurations_that_differ_in_accuracy_share_an_engine():
    assert family("early:resume:0.9") == ("early:resume", 0.9)
    assert family("early:resume:0.8")[0] == family("early:resume:0.9")[0] != family("early:propagate:0.9")[0]
    asked = speculative_config("early-heads:propagate:0.9", SETUP)
    assert asked is not None
    assert (asked["fill_in"], asked["prompt_lookup"]) == ("propagate", False)
    assert speculative_config("depth:3", SETUP) is None
    assert family("undrafted") == ("undrafted", 0)
    undrafted = speculative_config("undrafted", SETUP)
    assert undrafted is not None
    assert undrafted["policy"] == "fixed"
    asked = speculative_config("entropy:0.7", SETUP)
    assert asked is not None
    assert (asked["policy"], asked["target_accuracy"]) == ("entropy", 0.7)
    assert families(["ar", "early:resume:0.9", "depth:3", "early:resume:0.8"]) == [
        ["ar"],
        ["early:resume:0.9", "early:resume:0.8"],
        ["depth:3"],
    ]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Sure:\n```python\ndef one(x: List[int]) -> int:\n    return len(x)\n```\nDone.", True),
        ("def one(x):\n    return len(x)", True),
        ("```python\ndef one(x):\n    return 0\n```", False),
        ("```python\ndef one(x):\n    while True: pass\n```", False),
        ("```python\ndef one(x):\n    return len('x' * (3 << 30)) // (3 << 30)\n```", False),
        ("```python\nf = open('file', 'w'); f.write('x'); f.flush(); one = len\n```", False),
        ("I cannot.", False),
    ],
)
def test_code_is_run_within_limits(answer: str, right: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "LIMITS", quality.LIMITS.replace("RLIMIT_CPU, (10, 10)", "RLIMIT_CPU, (1, 1)"))
    asked = "Complete.\n```python\nfrom typing import List\n\ndef one(x):\n```"
    item = {"turns": [asked], "test": "def check(candidate):\n    assert candidate([5]) == 1", "entry_point": "one"}
    assert quality.passes(answer, item) == right


def test_the_final_answer_is_found():
    assert quality.final_answer("Answer: 3? No.\nAnswer: **17**.") == "17"
    assert quality.final_answer("42") == "42"


BY_THE_TOKEN = StepTimes((1, 2, 64), (0.1, 0.2, 6.4), (0.1, 0.1, 0.1), (1.0, 2.0, 64.0), (1.0, 2.0, 64.0))
"""Where every token costs as much as the first one."""


@pytest.mark.parametrize(
    ("text", "length", "copied", "accepted", "without", "checked"),
    [
        pytest.param([5, 6, 7, 8, 5, 6, 7, 8, 5], 5, 2, 2, (1 + 0.2 + 2) + 1, (1 + 0.2 + 2 + 0.2) + 1, id="right"),
        pytest.param([5, 1, 5, 2, 5, 3], 3, 2, 0, (1 + 0.2 + 2) + 2 * 1, (1 + 0.2 + 0.2) + 2 * 1, id="wrong"),
    ],
)
def test_a_check_below_the_cut_saves_what_wrong_copies_cost_above_it(
    text: list[int], length: int, copied: int, accepted: int, without: float, checked: float
):
    world = World(BY_THE_TOKEN, around=0.0, overhead=0.1, longest=2)
    for check, seconds in ((False, without), (True, checked)):
        found = world.replay([Request(np.array(text), length)], 1, check=check, everything=True)
        assert (found.tokens, found.copied, found.accepted) == (len(text) - length, copied, accepted)
        assert found.seconds == pytest.approx(seconds)


def test_configurations_take_turns_in_alternating_order():
    order = list(turns(["ar", "self-exit", "transformers:8"], [1, 8], 2))
    assert order[:2] == [(1, ["ar", "self-exit", "transformers:8"]), (8, ["ar", "self-exit"])]
    assert order[2:] == [(1, ["transformers:8", "self-exit", "ar"]), (8, ["self-exit", "ar"])]
    one_engine = list(turns(["ar", "fixed:8:1", "fixed:8:2"], [4], 1))
    assert one_engine == [(4, ["ar"]), (4, ["fixed:8:1"]), (4, ["fixed:8:2"])]


def test_a_contestant_pauses_between_steps(monkeypatch: pytest.MonkeyPatch):
    steps = list[int]()

    class Slow:
        def running(self, prompts: list[str], concurrency: int, split: bool = False) -> Generator[None, None, Run]:
            for n in range(3):
                time.sleep(1e-3)
                steps.append(n)
                yield
            return Run(1.0, [[concurrency]])

    monkeypatch.setattr("benchmarks.throughput.build", lambda *_: Slow())
    contestant = Contestant("ar", SETUP, ["one"])
    contestant.begin(7, None)
    steps.clear()
    assert [contestant.go_on(1e-4) for _ in range(3)] == [None] * 3
    assert steps == [0, 1, 2], "one step at a time"
    done = contestant.go_on(1e-4)
    assert done is not None
    assert done.outputs == [[7]]


def test_prompts_are_spread_over_their_file():
    assert spread(list("abcdefgh"), 4) == list("aceg")
    assert spread(list("abc"), 2) == list("ab")
    assert spread(list("abc"), 9) == list("abc")


def test_draft_lengths_of_the_same_rule_share_an_engine():
    assert family("fixed:8:3") == ("fixed:8", 3)
    assert family("layerskip:4:1") == ("layerskip:4", 1)
    assert family("ngram:2:4") == ("ngram:2", 4)
    assert family("self-exit") == ("self-exit", None)


def test_configurations_are_spelled_and_misspelled_ones_refused():
    assert speculative_config("ar", SETUP) is None
    assert speculative_config("self-exit", SETUP) == {"method": "self_exit", "model": "heads"}
    assert speculative_config("self-exit:1", SETUP) == {"method": "self_exit", "model": "heads", "exit_layer": [1]}
    assert speculative_config("heads-only", SETUP) == {"method": "self_exit", "model": "heads", "prompt_lookup": False}
    layerskip = speculative_config("layerskip:8:3", SETUP)
    assert layerskip == {"method": "self_exit", "head": "shared", "exit_layer": 8, "num_speculative_tokens": 3}
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 8}
    assert speculative_config("ngram:2:4", SETUP) == ngram
    for wrong in ("plain", "fixed", "fixed:8", "ngram:4"):
        with pytest.raises(ValueError, match="there is no configuration"):
            speculative_config(wrong, SETUP)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_roofline_behaves(shape):  # type: ignore[no-untyped-def]
    quarter = shape.layers // 4
    assert speedup(H100, shape, quarter, 0.6, 1, 0) == 1.0
    gains = [best(H100, shape, quarter, acceptance, 1)[0] for acceptance in (0.3, 0.5, 0.7, 0.9)]
    assert gains == sorted(gains)
    assert all(gain >= 1 for gain in gains)


def test_on_paper_a_large_model_bound_by_arithmetic_gains_nothing():
    large = next(shape for shape in SHAPES if "70B" in shape.name)
    assert best(H100, large, 20, 0.6, 256) == (1.0, 0)


def test_a_servers_record_is_relative_to_the_baseline_of_the_same_repeat():
    from benchmarks.serve import MEASURED, Load, Server
    from benchmarks.serve import record as record_server

    def run(speed: float, **others: float) -> dict[str, float]:
        return dict.fromkeys(MEASURED, 1.0) | {"output_throughput": speed} | others

    load = Load("model", "folder", Path("p.jsonl"), 4, 16)
    ours = [run(20.0, spec_decode_acceptance_rate=50.0), run(30.0, spec_decode_acceptance_rate=60.0), run(20.0)]
    found = record_server(Server("ours", "http://x"), load, 8, ours, [run(10.0), run(10.0), run(20.0)])
    assert found["speedup"] == 2.0  # the median of 2, 3 and 1
    assert found["output_throughput"] == 20.0
    assert found["acceptance_rate"] == 0.55
    assert found["repeats"] == [20.0, 30.0, 20.0]


def test_vllm_bench_serve_knows_every_option_it_is_given():
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from benchmarks.serve import Load, Server

    command = Load("model", "folder", Path("p.jsonl"), 4, 16).command(Server("a", "http://x"), 8, Path("d/r.json"))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = parser.parse_args(command[command.index("serve") + 1 :])
    assert (given.base_url, given.max_concurrency, given.num_prompts) == ("http://x", 8, 4)
    assert (given.temperature, given.custom_output_len, given.result_filename) == (0, 16, "r.json")


def test_a_server_is_named_with_its_address():
    import argparse

    from benchmarks.serve import Server

    assert Server.parse("plain=http://127.0.0.1:8000/") == Server("plain", "http://127.0.0.1:8000")
    for wrong in ("http://127.0.0.1:8000", "plain=", "=http://x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=URL"):
            Server.parse(wrong)


def test_answers_of_different_lengths_have_the_same_lengths_in_every_run():
    prompts = [f"question {n}" for n in range(2000)]
    assert {SETUP.length(prompt) for prompt in prompts} == {8}
    lengths = [replace(SETUP, min_tokens=2).length(prompt) for prompt in prompts]
    counts = Counter(lengths)
    assert set(counts) == {2, 3, 4, 5, 6, 7, 8}
    assert min(counts.values()) > 200
    assert lengths == [replace(SETUP, min_tokens=2).length(prompt) for prompt in prompts]


def test_draws_agree_with_what_is_sampled_as_often_as_their_coupling_says():
    """A head that knows two of three tokens; against Gumbel sampling's closed form (Daliri et al. 2024)."""
    torch.manual_seed(0)
    p, q, known, n = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.6]), torch.tensor([0, 2]), 20_000
    noise = -torch.empty(1, n, 3).exponential_().log()
    first, drawn, limit = (draws.rates(p.log().expand(n, 3), q.log().expand(n, 2), known, noise) / n).tolist()
    whole = torch.tensor([0.4, 0.0, 0.6])
    both = [1 / torch.maximum(p / p[token], whole / whole[token]).sum().item() for token in (0, 2)]
    assert first == pytest.approx(0.2)
    assert limit == pytest.approx(0.4 + 0.2)
    assert drawn == pytest.approx(sum(both), abs=0.015)
    assert first < drawn < limit
