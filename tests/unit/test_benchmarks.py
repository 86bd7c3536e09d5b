"""The benchmarks' own arithmetic."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import draws, quality, throughput
from benchmarks.cascade import Request, World
from benchmarks.engines import Run, Setup, family, lengthened, named_dtype, speculative_config
from benchmarks.oracle import Oracle
from benchmarks.quality import families
from benchmarks.roofline import H100, SHAPES, best, speedup
from benchmarks.throughput import Measured, contenders, early_exits, own_cores, record, spread, turns
from tests.unit.helpers import LAYERS, make_model
from vllm_earlyexit.engine.cost import StepTimes
from vllm_earlyexit.engine.early_exit import Limits
from vllm_earlyexit.engine.head import Asked
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.turns import Child

SETUP = Setup("model", "heads", "bfloat16", True, 8, 4, 64)


def test_a_record_compares_each_repeat_with_plain_decoding_of_the_same_repeat():
    plain = [Run(2.0, [[1, 2], [3, 4]]), Run(4.0, [[1, 2], [3, 4]]), Run(1.0, [[1, 2], [3, 4]])]
    ours = [
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[2, 0]),
        Run(1.0, [[1, 2], [3, 5]], drafts=3, drafted=4, accepted=2, accepted_at=[1, 1]),
        Run(1.0, [[1, 2], [3, 5]], drafts=2, drafted=2, accepted=1, accepted_at=[1, 0]),
    ]
    alone = {
        ("ar", 1): [Run(1.0, [[1, 2], [3, 6]])],
        ("ar", 2): [Run(2.0, [[1, 2], [3, 4]]), Run(4.0, [[1, 2], [3, 4]])],
        ("self-exit", 1): [Run(1.0, [[1, 2], [3, 5]])],
        ("self-exit", 2): [Run(1.0, [[1, 2], [3, 5]]), Run(2.0, [[1, 2], [3, 5]])],
    }
    measured = Measured(SETUP, Path("dir/prompts.jsonl"), alone, {("ar", 2): plain, ("self-exit", 2): ours})
    found = record(measured, "self-exit", 2)
    assert found["speedup_vs_ar"] == 2.0  # the median of 2, 4 and 1
    assert (found["baseline"], found["ratios"]) == ("ar", [2.0, 4.0, 1.0])
    assert found["tokens_per_s"] == 4.0
    assert found["ms_per_token"] == 250.0
    assert found["acceptance_rate"] == 0.5
    assert found["acceptance_length"] == round(1 + 5 / 8, 3)
    assert found["accepted_at"] == [4, 1]
    assert found["identical_outputs"] == 1
    assert found["repeats"] == [4.0, 4.0, 4.0]
    assert (found["alone_repeats"], found["alone_tokens_per_s"], found["turns_over_alone"]) == ([4.0, 2.0], 3.0, 1.333)
    assert found["identical_to_plain_at_smallest_concurrency"] == 1
    assert record(measured, "ar", 2)["speedup_vs_ar"] is None
    by_itself = record(measured, "self-exit", 1)
    assert (by_itself["tokens_per_s"], by_itself["believable"], by_itself["alone_tokens_per_s"]) == (None, None, 4.0)


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
    order = list(turns(["ar", "fixed:8:1", "transformers:8"], [1, 8], 2))
    assert order[:2] == [(0, 1, ["ar", "fixed:8:1", "transformers:8"]), (0, 8, ["ar", "fixed:8:1"])]
    assert order[2:] == [(1, 1, ["transformers:8", "fixed:8:1", "ar"]), (1, 8, ["fixed:8:1", "ar"])]


SPINNING = """
import subprocess, sys
from vllm_earlyexit.turns import answer, questions
below = subprocess.Popen([sys.executable, "-c", "while True: pass"])
for question in questions():
    print("said beside it")
    answer([question, below.pid])
"""


def ticks(pid: int) -> int:
    """Return the processor time of a process, in clock ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def alive(pid: int) -> bool:
    """Return whether a process has not ended; one that nobody has asked how it ended has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.05)


def spinning(log: Path) -> tuple[Child, int]:
    """Return a child and the process that it has started, which spins."""
    child = Child("spinning", [sys.executable, "-c", SPINNING], log)
    return child, child.ask("who?")[1]


def test_who_waits_for_its_turn_takes_no_time_and_neither_does_what_it_has_started(tmp_path: Path):
    child, below = spinning(tmp_path / "log")
    try:
        child.pause()
        time.sleep(0.1)
        before = ticks(below)
        time.sleep(0.5)
        assert ticks(below) == before
        with child.turn():
            assert child.ask({"is it": "you"})[0] == {"is it": "you"}
            deadline = time.monotonic() + 20
            while ticks(below) == before:
                assert time.monotonic() < deadline, "it did not go on"
        time.sleep(0.1)
        before = ticks(below)
        time.sleep(0.3)
        assert ticks(below) == before, "it is paused again"
    finally:
        child.stop()
    assert (tmp_path / "log").read_text() == "said beside it\n" * 2


@pytest.mark.parametrize("paused", [False, True])
def test_nothing_is_left_of_who_is_ended(tmp_path: Path, paused: bool):
    child, below = spinning(tmp_path / "log")
    if paused:
        child.pause()
    assert child.stop() == child.stop() == 0, "it ended by itself, once"
    wait_for([child.process.pid, below])


def test_nothing_is_left_when_who_started_it_is_killed(tmp_path: Path):
    starting = f"""
import os, sys
from pathlib import Path
from vllm_earlyexit.turns import Child
child = Child("spinning", [sys.executable, "-c", {SPINNING!r}], Path({str(tmp_path / "log")!r}))
below = child.ask("who?")[1]
child.pause()
print(child.process.pid, below, flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", starting], stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        os.kill(parent.pid, signal.SIGKILL)
        wait_for(pids)


def test_who_has_died_is_named_with_its_log(tmp_path: Path):
    dying = "from vllm_earlyexit.turns import questions\nfor q in questions(): raise SystemExit('no memory')"
    child = Child("plain", [sys.executable, "-c", dying], tmp_path / "log")
    with pytest.raises(EarlyExitError) as caught:
        child.ask(1)
    assert str(caught.value) == f"the plain engine stopped; its log {tmp_path / 'log'} says why"
    assert (tmp_path / "log").read_text() == "no memory\n"
    with pytest.raises(EarlyExitError, match="stopped"):
        child.ask(2)
    assert child.stop() == 1


class Stub:
    """Engines of given speeds, by configuration and concurrency; in turns these are multiplied."""

    speeds: dict[tuple[str, int], float]
    in_turns: float

    def __init__(self, configs: list[str], *_: Any):
        self.families, self.started, self.most, self.factor = {config: [config] for config in configs}, set(), 0, 1.0
        self.dtypes: dict[str, str] = {}
        Stub.last = self

    def start(self, name: str, setup: Setup) -> float:
        self.started.add(name)
        self.dtypes[name] = setup.dtype
        self.factor = self.in_turns if len(self.started) > 1 else 1.0
        self.most = max(self.most, len(self.started))
        return 1.0

    def run(self, config: str, concurrency: int, passes: int = 1, split: bool = False) -> list[Run]:
        assert config in self.started
        return [Run(1 / self.speeds[config, concurrency] / self.factor, [[1], [2]], split={"head": 0.0})] * passes

    def stop(self, name: str) -> None:
        self.started.remove(name)

    def close(self) -> None:
        self.started.clear()


SPEEDS = {
    ("ar@bfloat16", 1): 10.0,
    ("ar@float32", 1): 20.0,
    ("self-exit", 1): 30.0,
    ("ar@bfloat16", 8): 50.0,
    ("ar@float32", 8): 40.0,
    ("self-exit", 8): 60.0,
}


def measure(monkeypatch: pytest.MonkeyPatch, folder: Path, in_turns: float, *options: str) -> list[dict[str, Any]]:
    """Run the throughput benchmark with stubs; return its records."""
    asked = folder / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"id": n, "turns": [f"Count to {n}."]}) + "\n" for n in (3, 5)))
    command = ["throughput", "--model", "org/model", "--prompts", str(asked), "--out", str(folder / "out"), *options]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(throughput, "Engines", Stub)
    monkeypatch.setattr(Stub, "speeds", SPEEDS, raising=False)
    monkeypatch.setattr(Stub, "in_turns", in_turns, raising=False)
    throughput.main()
    return json.loads((folder / "out" / "results.json").read_text())


def test_the_baseline_is_plain_vllm_in_the_dtype_that_is_faster_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = measure(monkeypatch, tmp_path, 1.0, "--concurrency", "1", "8")
    by_name = {(item["config"], item["concurrency"]): item for item in found}
    assert {key: item["baseline"] for key, item in by_name.items() if key[0] == "self-exit"} == {
        ("self-exit", 1): "ar@float32",
        ("self-exit", 8): "ar@bfloat16",
    }
    assert by_name["self-exit", 1]["speedup_vs_ar"] == 1.5
    assert by_name["self-exit", 8]["speedup_vs_ar"] == 1.2
    assert by_name["self-exit", 8]["dtype"] == Stub.last.dtypes["self-exit"] == "float32", "of the smallest concurrency"
    assert by_name["ar@float32", 8]["ratios"] == [0.8] * 5


def test_a_dtype_that_makes_plain_vllm_nowhere_faster_takes_no_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = {item["config"]: item for item in measure(monkeypatch, tmp_path, 1.0)}
    assert (found["ar@bfloat16"]["alone_tokens_per_s"], found["ar@bfloat16"]["repeats"]) == (20.0, [])
    assert found["ar@float32"]["repeats"] == [40.0] * 5
    assert found["self-exit"]["speedup_vs_ar"] == 1.5
    assert Stub.last.most == 2
    assert "--model org/model" in found["self-exit"]["provenance"]["command"]


@pytest.mark.parametrize(("in_turns", "believable"), [(0.94, False), (0.96, True), (1.04, True), (1.06, False)])
def test_turns_that_are_not_what_an_engine_makes_alone_are_not_believed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    in_turns: float,
    believable: bool,
):
    if believable:
        measure(monkeypatch, tmp_path, in_turns)
    else:
        with pytest.raises(SystemExit) as caught:
            measure(monkeypatch, tmp_path, in_turns)
        assert caught.value.code == 1
    found = {item["config"]: item for item in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert found["self-exit"]["turns_over_alone"] == in_turns
    assert found["self-exit"]["believable"] is believable
    assert (tmp_path / "out" / "speed.png").exists() == believable
    said = capsys.readouterr().out
    assert ("┏" in said) == believable, "a table"
    assert (f"self-exit at 1 made {60 * in_turns:.1f} tokens/s in turns and 60.0 alone" in said) != believable


def test_plain_vllm_is_measured_even_if_nobody_asks_for_it():
    assert contenders(["self-exit"], "float32") == ["ar", "self-exit"]
    assert contenders(["self-exit", "ar"], "auto") == ["ar@bfloat16", "ar@float32", "self-exit"]
    assert contenders(["ar@float32", "self-exit"], "float32") == ["ar@float32", "self-exit"]
    assert contenders(["ar@bfloat16"], "float32") == ["ar", "ar@bfloat16"]


def test_a_configuration_may_name_its_dtype():
    assert named_dtype("self-exit@float32") == ("self-exit", "float32")
    assert named_dtype("ngram:2:4") == ("ngram:2:4", None)
    assert named_dtype("eagle3:4:folder@float64") == ("eagle3:4:folder@float64", None)
    assert family("ngram:2:4@float32") == ("ngram:2@float32", 4)
    assert family("early:resume:0.9@bfloat16") == ("early:resume@bfloat16", 0.9)
    assert family("ar@float32")[0] != family("ar")[0]
    assert family("undrafted@float32") == ("undrafted@float32", 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--configs", "plain"], "there is no configuration 'plain'"),
        (["--configs", "ar@float64"], "there is no configuration 'ar@float64'"),
        (["--configs", "transformers"], "there is no configuration 'transformers'"),
        (["--context-tokens", "2000", "--max-tokens", "100"], "together must be at most --max-model-len"),
        (["--context-tokens", "200", "--num-prompts", "1"], "--num-prompts must be at least 2"),
        (["--min-tokens", "200"], "--min-tokens must be 1 to --max-tokens"),
        (["--repeats", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(options: list[str], sentence: str):
    asked = throughput.parsed(["--model", "org/model", "--prompts", "p", "--out", "o", *options])
    with pytest.raises(SystemExit) as caught:
        throughput.checked(asked)
    assert sentence in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("arctic_inference") is not None, reason="it is installed")
def test_suffix_decoding_says_what_it_needs():
    assert speculative_config("suffix:24", SETUP) == {"method": "suffix", "num_speculative_tokens": 24}
    asked = throughput.parsed(["--model", "org/model", "--prompts", "p", "--out", "o", "--configs", "suffix:24"])
    with pytest.raises(SystemExit, match="pip install arctic-inference"):
        throughput.checked(asked)


def test_prompts_are_lengthened_with_other_prompts_and_share_no_beginning():
    asked, texts = [[91, 1, 92], [91, 1, 2, 92], [91, 3, 92]], [[1], [1, 2], [3, 3]]
    found = lengthened(asked, texts, 8)
    assert [len(ids) for ids in found] == [8] * 3
    assert found == [[1, 2, 3, 3, 1, 91, 1, 92], [3, 3, 1, 3, 91, 1, 2, 92], [2, 1, 1, 2, 1, 91, 3, 92]]
    assert len({ids[0] for ids in found}) == 3
    assert lengthened(asked, texts, 8) == found
    assert lengthened(asked, texts, 4)[1] == asked[1]


def detailed(*requests: tuple[float, float, list[float], int]) -> dict[str, Any]:
    keys = ("start_times", "ttfts", "itls", "output_lens")
    return dict(zip(keys, map(list, zip(*requests, strict=True)), strict=True))


def test_a_ramps_windows_compare_the_tokens_of_the_same_ten_seconds():
    from benchmarks.serve import windows

    # Chunks at 2, 6, 14 and 22 s of 2 tokens each, and at 5 and 21 s of one: 5, 2, and an unfinished window.
    ours = detailed((100.0, 2.0, [4.0, 8.0, 8.0], 8), (101.0, 4.0, [16.0], 2))
    plain = detailed((7.0, 1.0, [3.0, 8.0, 8.0, 12.0], 5))  # chunks at 1, 4, 12, 20 and 32 s: 2, 1, 1
    assert windows([ours, plain], [plain, plain]) == {"windows": [[2.5, 2.0], [1.0, 1.0, 1.0]], "lowest_window": 1.0}
    short = detailed((0.0, 1.0, [1.0], 2))
    assert windows([short], [plain]) == {"windows": [[]], "lowest_window": None}


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
    from benchmarks.serve import MEASURED, Load, Stage
    from benchmarks.serve import record as record_server

    def run(speed: float, **others: float) -> dict[str, float]:
        return dict.fromkeys(MEASURED, 1.0) | {"output_throughput": speed} | others

    load = Load("model", Path("p.jsonl"), 16)
    ours = [run(20.0, spec_decode_acceptance_rate=50.0), run(30.0, spec_decode_acceptance_rate=60.0), run(20.0)]
    base, alone = [run(10.0), run(10.0), run(20.0)], [run(20.0), run(22.0)]
    found = record_server("ours", load, Stage(0, 8, 4, 0), ours, base, alone)
    assert found["speedup"] == 2.0  # the median of 2, 3 and 1
    assert found["output_throughput"] == 20.0
    assert found["acceptance_rate"] == 0.55
    assert found["repeats"] == [20.0, 30.0, 20.0]
    assert (found["alone_tokens_per_s"], found["turns_over_alone"], found["believable"]) == (21.0, 0.952, True)


def test_vllm_bench_serve_knows_every_option_it_is_given():
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from benchmarks.serve import Load, Stage

    command = Load("model", Path("p.jsonl"), 16).command("http://x", Stage(0, 8, 40, 16), Path("d/r.json"))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = parser.parse_args(command[command.index("serve") + 1 :])
    assert (given.base_url, given.max_concurrency, given.num_prompts, given.num_warmups) == ("http://x", 8, 40, 16)
    assert (given.temperature, given.custom_output_len, given.result_filename) == (0, 16, "r.json")
    assert given.save_detailed


def test_a_server_is_named_with_its_arguments():
    import argparse

    from benchmarks.serve import Entrant

    assert Entrant.parse("plain=") == Entrant("plain", ())
    ours = Entrant.parse("self-exit=--speculative-model '[self-exit]:a folder'")
    assert ours == Entrant("self-exit", ("--speculative-model", "[self-exit]:a folder"))
    for wrong in ("plain", "=--dtype float32", "--dtype=float32"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=ARGUMENTS"):
            Entrant.parse(wrong)


def test_a_ramp_is_one_turn_and_concurrencies_are_one_each():
    from benchmarks.serve import Stage, parsed, stages_of

    common = ["plain=", "--model", "m", "--prompts", "p", "--out", "o"]
    ramp = parsed([*common, "--ramp", "1", "4", "1", "--prompts-per-stage", "5"])
    assert stages_of(ramp, 20) == [[Stage(0, 1, 5, 2), Stage(1, 4, 20, 0), Stage(2, 1, 5, 0)]]
    each = parsed([*common, "--concurrency", "1", "16"])
    assert stages_of(each, 20) == [[Stage(0, 1, 20, 2)], [Stage(1, 16, 20, 20)]]


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


def test_engines_get_all_cores_though_what_starts_them_is_bound_to_one():
    """OpenMP, preloaded, binds Ray's processes to one core; plain vLLM on that core looked half as fast as it is."""
    allowed = os.sched_getaffinity(0)
    asked = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.environ |= GIVEN\n"
    asked += "from benchmarks.contestant import claim_cores, engine_environment\n"
    asked += "claim_cores(); e = engine_environment()\n"
    asked += "print(e['VLLM_CPU_OMP_THREADS_BIND'], e['OMP_NUM_THREADS'])"
    plain = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_OMP_THREADS_BIND"}

    def environment(given: dict[str, str]) -> str:
        command = [sys.executable, "-c", asked.replace("GIVEN", repr(given))]
        return subprocess.run(command, env=plain, check=True, capture_output=True, text=True).stdout.split("\n")[0]

    everything = f"{','.join(map(str, sorted(allowed)))} {len(allowed)}"
    assert environment({}) == everything
    assert environment(own_cores()) == everything
    assert environment({"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"}) == "0 1"
