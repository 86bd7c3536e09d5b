"""From text to a calibrated checkpoint through the command line, on a tiny model; and what goes wrong on the way."""

import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tests.engine.conftest import engine
from tests.engine.tiny import add_tokenizer, tiny_model
from vllm_earlyexit.cli import app
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import load_heads, read_config
from vllm_earlyexit.training.classroom import Classroom
from vllm_earlyexit.training.narrow import width_of
from vllm_earlyexit.training.packs import Records
from vllm_earlyexit.training.shards import Batch
from vllm_earlyexit.training.teacher import Teacher
from vllm_earlyexit.training.train import TrainingOptions, _start, train_heads, training_identity

QUICK = ("--draft-vocab-size", "48", "--intermediate-size", "96", "--batch-tokens", "256", "--held-out", "0.2")


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = random.Random(0)
    lines = [{"id": n, "text": " ".join(f"w{draw.randrange(64)}" for _ in range(80))} for n in range(150)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def records(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "records"
    run("collect", model, "--engine", "transformers", "--data", text, "--out", folder, "--exit-layer", "2")
    return folder


def test_text_becomes_heads_that_are_calibrated_and_described(model: Path, records: Path, tmp_path: Path):
    heads = tmp_path / "heads"
    kinds = ("shared", "mlp", "tail", "recurrent")
    asked = [part for kind in kinds for part in ("--kind", kind)]
    said = run("train", model, "--records", records, "--out", heads, *QUICK, *asked, "--epochs", "6")
    assert "needs up to" in said
    assert "GB of memory" in said
    agreed = {kind: read_config(heads / kind).provenance["held_out_agreement"]["2"] for kind in kinds}
    assert all(len(values) == 4 for values in agreed.values())
    assert agreed["mlp"][0] > agreed["shared"][0]
    assert agreed["recurrent"][0] > agreed["shared"][0] + 0.1
    assert (heads / "learning-curve.png").stat().st_size > 1000
    assert not (heads / ".training").exists()

    run("calibrate", model, heads / "recurrent", "--records", records)
    config = read_config(heads / "recurrent")
    calibration = config.exits[0].calibration
    assert calibration is not None
    assert calibration.agreement == pytest.approx(agreed["recurrent"][0], abs=0.02)  # stored in bfloat16
    assert len(calibration.positions) == 4
    assert {signal.name for signal in calibration.signals} == {"entropy", "max_probability", "margin", "probe"}
    assert config.recommended is not None
    assert run("report", heads / "recurrent").endswith("README.md")
    page = (heads / "recurrent" / "README.md").read_text()
    assert f"{calibration.positions[3].agreement:.1%}" in page
    assert "risk-coverage.png" in page
    assert config.fingerprint in page


@pytest.mark.parametrize("eager", [("--eager",), ()], ids=["eager", "compiled"])
def test_vllm_records_what_transformers_records(
    model: Path, text: Path, records: Path, tmp_path: Path, eager: tuple[str, ...]
):
    run("collect", model, "--data", text, "--out", tmp_path / "served", "--exit-layer", "2", *eager)
    reference, served = by_window(records), by_window(tmp_path / "served")
    assert len(served) == 150
    check_same(reference, served)


def by_window(folder: Path) -> dict[int, Batch]:
    return {
        key: shard.read(n, n + 1)
        for shard in Records([folder]).shards
        for n, key in enumerate(shard.windows[:, 1].tolist())
    }


def check_same(reference: dict[int, Batch], other: dict[int, Batch], layers: tuple[int, ...] = (2, 3)) -> None:
    """Two ways of recording saw the same."""
    assert reference.keys() == other.keys()
    same = total = 0
    for key, here in reference.items():
        there = other[key]
        assert torch.equal(here.ids, there.ids)
        assert torch.equal(here.scored, there.scored)
        for a, b in [(here.final, there.final), *((here.hidden[n], there.hidden[n]) for n in layers)]:
            # Both are bfloat16, which rounds to 1 part in 256, over four layers.
            assert (a.float() - b.float()).norm() < 0.03 * a.float().norm()
        same += int((here.top_ids[:, 0] == there.top_ids[:, 0]).sum())
        total += len(here.top_ids)
        assert (here.top_p[:, 0].float() - there.top_p[:, 0].float()).abs().mean() < 0.02
    assert same > 0.97 * total


def test_answers_are_the_models_own(model: Path, tmp_path: Path):
    from vllm import SamplingParams

    prompts = tmp_path / "prompts.jsonl"
    asked = [{"id": n, "turns": [f"w{n} w{n + 20}", f"w{n + 9}"]} for n in range(8)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked))
    out = tmp_path / "records"
    collect = (
        "collect",
        model,
        "--prompts",
        prompts,
        "--exit-layer",
        "2",
        "--out",
        out,
        "--answer-tokens",
        "12",
        "--eager",
    )
    assert "16 answers and" in run(*collect)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert sorted((a["id"], a["turn"]) for a in answers) == [(str(n), turn) for n in range(8) for turn in (0, 1)]
    with engine(model, dtype="bfloat16") as llm:
        params = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
        greedy = 0
        for answer in answers:
            prompt, said = answer["ids"][: answer["answer_start"]], answer["ids"][answer["answer_start"] :]
            inputs: Any = {"prompt_token_ids": prompt}
            greedy += list(llm.generate(inputs, params, use_tqdm=False)[0].outputs[0].token_ids) == said
    assert greedy >= 10  # three in four are greedy; bfloat16 may part at near ties

    on_the_way = by_window(out)

    # A killed run: the last answer is half a line, and one shard is missing.
    data = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(data[:-20])
    next(out.glob("shard-*")).unlink()
    assert "1 answers and" in run(*collect)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 16
    prefilled = by_window(out)
    assert len(prefilled) == 16
    again = on_the_way.keys() & prefilled.keys()
    assert len(again) >= 15  # an answer that was lost is another one if it is sampled
    check_same({key: on_the_way[key] for key in again}, {key: prefilled[key] for key in again})


def test_collecting_goes_on_where_it_stopped(model: Path, text: Path, tmp_path: Path):
    out = tmp_path / "records"
    collect = ("collect", model, "--engine", "transformers", "--data", text, "--out", out, "--exit-layer", "2")
    run(*collect, "--max-tokens", "1000")
    assert 5 < sum(len(shard.lengths) for shard in Records([out]).shards) < 20
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run(*collect)
    assert all((out / name).read_bytes() == content for name, content in first.items())
    keys = [key for shard in Records([out]).shards for key in shard.windows[:, 1].tolist()]
    assert len(keys) == len(set(keys)) == 150
    assert "0 recorded tokens" in run(*collect)


def test_a_damaged_shard_is_recorded_again(model: Path, text: Path, records: Path, tmp_path: Path):
    out = shutil.copytree(records, tmp_path / "records")
    next(out.glob("shard-*")).write_bytes(b"damaged")
    said = run("collect", model, "--engine", "transformers", "--data", text, "--out", out, "--exit-layer", "2")
    assert "skipped:" in said
    assert "shard-00000.safetensors is damaged" in said
    assert sum(len(shard.lengths) for shard in Records([out]).shards) == 150


def test_records_are_taken_over_to_other_exits(model: Path, text: Path, records: Path, tmp_path: Path):
    collect = ("collect", model, "--exit-layer", "1", "--exit-layer", "2", "--out")
    run(*collect, tmp_path / "anew", "--engine", "transformers", "--data", text)
    taken = (*collect, tmp_path / "taken", "--records", records)
    assert " 12000 recorded tokens" in run(*taken)
    check_same(by_window(tmp_path / "anew"), by_window(tmp_path / "taken"), layers=(1, 2, 3))
    assert " 0 recorded tokens" in run(*taken), "what is there is not run again"
    said = run(*collect, tmp_path / "fewer", "--records", records, "--top-k", "4", code=2)
    assert "holds records of 'model' with another top_k than this run's" in said


class Killed(Exception):
    """Stands for a signal in the middle of training."""


def test_an_interrupted_training_goes_on(model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = TrainingOptions(
        intermediate_size=96, draft_vocab_size=48, batch_tokens=256, held_out=0.2, epochs=2, evaluations=4
    )
    train_heads(str(model), [records], tmp_path / "whole", options=options)

    from vllm_earlyexit.training import train

    seen = 0

    def killed_after_half(*arguments: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen > 50:
            raise Killed
        return kl(*arguments)

    kl = train.LOSSES["kl"]
    with monkeypatch.context() as patch:
        patch.setitem(train.LOSSES, "kl", killed_after_half)
        with pytest.raises(Killed):
            train_heads(str(model), [records], tmp_path / "halved", options=options)
    with pytest.raises(EarlyExitError, match=r"no config\.json"):
        load_heads(tmp_path / "halved")
    with pytest.raises(EarlyExitError, match="an interrupted run with other options"):
        train_heads(str(model), [records], tmp_path / "halved", options=TrainingOptions(seed=1))
    # A checkpoint that was being written when the run was killed.
    (tmp_path / "halved" / ".training" / "checkpoint-9999").mkdir()
    train_heads(str(model), [records], tmp_path / "halved", options=options)
    whole, halved = (load_heads(tmp_path / name) for name in ("whole", "halved"))
    curves = [[(p["tokens"], p["agreement"]) for p in heads.config.provenance["curve"]] for heads in (whole, halved)]
    assert curves[0] == curves[1]
    for ours, theirs in zip(whole.modules[2].parameters(), halved.modules[2].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_stops_early_and_keeps_the_best(model: Path, records: Path, tmp_path: Path):
    options = TrainingOptions(
        intermediate_size=96, draft_vocab_size=48, batch_tokens=256, held_out=0.2, epochs=40, evaluations=40, patience=2
    )
    config = train_heads(str(model), [records], tmp_path / "heads", options=options)["recurrent"].config

    def trained_for(agreed: list[float]) -> float:
        return statistics.mean(agreed[position - 1] for position in options.draft_positions)

    curve = [trained_for(point["agreement"]["recurrent-2"]) for point in config.provenance["curve"]]
    assert len(curve) < 41
    best = max(range(1, len(curve)), key=curve.__getitem__)
    assert best == len(curve) - 3
    assert trained_for(config.provenance["held_out_agreement"]["2"]) == pytest.approx(curve[best], abs=0.01)


def test_heads_that_training_makes_worse_stay_what_they_were(model: Path, records: Path, tmp_path: Path):
    options = TrainingOptions(
        intermediate_size=96, draft_vocab_size=48, batch_tokens=256, held_out=0.2, evaluations=2, learning_rate=0.1
    )
    config = train_heads(str(model), [records], tmp_path / "heads", options=options)["recurrent"].config
    start, *later = [point["agreement"]["recurrent-2"] for point in config.provenance["curve"]]
    assert max(map(max, later)) < min(start)
    assert config.provenance["held_out_agreement"]["2"] == start


def test_only_the_asked_draft_positions_are_trained(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps, features = [], Classroom.features

    def noted(self: Classroom, module: nn.Module, hidden: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        steps.append(step)
        return features(self, module, hidden, batch, step)

    monkeypatch.setattr(Classroom, "features", noted)
    train = ("train", model, "--records", records, *QUICK, "--max-tokens", "6000")
    run(*train, "--out", tmp_path / "whole")
    assert set(steps) == {0, 1, 2, 3}
    steps.clear()
    run(*train, "--out", tmp_path / "fourth", "--draft-position", "4")
    assert set(steps) == {3}
    assert load_heads(tmp_path / "fourth").config.provenance["options"]["draft_positions"] == [4]
    said = run(*train, "--out", tmp_path / "fifth", "--draft-position", "5", code=2)
    assert "draft positions that can be trained are 1 to 4, not 5" in said


def test_deterministic_training_repeats_itself(model: Path, records: Path, tmp_path: Path):
    train = ("train", model, "--records", records, *QUICK, "--max-tokens", "3000", "--deterministic")
    run(*train, "--out", tmp_path / "a", "--seed", "5")
    run(*train, "--out", tmp_path / "b", "--seed", "5")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_records_that_changed_do_not_continue_a_training(model: Path, records: Path, text: Path, tmp_path: Path):
    options = TrainingOptions(intermediate_size=96, draft_vocab_size=48, batch_tokens=256, held_out=0.2)
    before = training_identity(Records([records]), [2], options)
    assert before == training_identity(Records([records]), [2], options)
    out = tmp_path / "records"
    collect = ("collect", model, "--engine", "transformers", "--data", text, "--out", out, "--exit-layer", "2")
    run(*collect, "--max-tokens", "1000")
    assert before != training_identity(Records([out]), [2], options)


def test_training_fits_into_the_memory_it_states(model: Path, records: Path, tmp_path: Path):
    """The process may not allocate more than what training says it needs up to."""
    script = (
        "import resource, sys; from pathlib import Path; from vllm_earlyexit.training.train import *;"
        "limit = int(sys.argv[4]); resource.setrlimit(resource.RLIMIT_DATA, (limit, limit));"
        "train_heads(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]),"
        " options=TrainingOptions(max_tokens=20_000, epochs=9, held_out=0.2))"
    )

    def trained(limit: float) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", script, str(model), str(records), str(tmp_path / "heads"), str(int(limit))]
        return subprocess.run(command, capture_output=True, text=True)

    done = trained(1.0e9)
    assert done.returncode == 0, done.stderr
    said = re.search(r"needs up to ([0-9.]+) GB", done.stdout)
    assert said is not None
    assert float(said[1]) * 1e9 >= 1.0e9
    assert trained(0.2e9).returncode != 0  # the limit is one


def test_training_goes_on_from_trained_heads(model: Path, text: Path, records: Path, tmp_path: Path):
    cuts = ("--exit-layer", "1", "--exit-layer", "2")
    both = tmp_path / "records"
    run("collect", model, "--engine", "transformers", "--data", text, "--out", both, *cuts)
    trained = tmp_path / "trained"
    run("train", model, "--records", both, "--out", trained, "--exit-layer", "2", *QUICK, "--epochs", "6")

    def first(name: str, *start: str | Path) -> dict[str, list[float]]:
        out = tmp_path / name
        run("train", model, "--records", both, "--out", out, *cuts, *QUICK, "--max-tokens", "300", *start)
        return read_config(out).provenance["curve"][0]["agreement"]

    afresh, onwards = first("afresh"), first("onwards", "--start-from", trained)
    agreed = read_config(trained).provenance["curve"][-1]["agreement"]["recurrent-2"]
    assert onwards["recurrent-2"] == pytest.approx(agreed, abs=0.02)  # stored in bfloat16
    assert onwards["recurrent-1"][0] > afresh["recurrent-1"][0] + 0.02

    start = ("--records", both, "--out", tmp_path / "no", "--start-from", trained)
    assert "train this kind, at most as wide" in run("train", model, *start, *QUICK, "--kind", "tail", code=2)
    assert "no hidden states after layer 2" in run(
        "train", model, "--records", _one_cut(model, text, tmp_path), *start[2:], *QUICK, code=2
    )


def test_heads_that_are_narrower_than_the_model_start_as_its_last_layer_too(model: Path, records: Path):
    opened, teacher = Records([records]), Teacher(model, "cpu", torch.float32)
    options = TrainingOptions(intermediate_size=64, batch_tokens=256, held_out=0.2)
    head = _start(Classroom.of(teacher, None), [2], opened, None, options)["recurrent-2"]
    hidden = opened.packs(256, (2, teacher.num_layers - 1), 0.2, False)[0].hidden[teacher.num_layers - 1].float()
    last = teacher.model.get_decoder().layers[-1]
    with torch.no_grad():
        added, whole = head.mlp(hidden) - hidden, last.mlp(last.post_attention_layernorm(hidden))
    assert width_of(head.mlp) == 64 < teacher.intermediate_size
    assert (added - whole).norm() < 0.6 * whole.norm()


def test_heads_become_narrower(model: Path, records: Path, tmp_path: Path):
    """Before any training they do better than heads of that width that start from the model."""
    wide, few = tmp_path / "wide", ("--max-tokens", "300", "--intermediate-size", "24")
    run("train", model, "--records", records, "--out", wide, *QUICK, "--epochs", "6")
    agreed = {}
    for name, start in (("afresh", ()), ("narrow", ("--start-from", wide))):
        run("train", model, "--records", records, "--out", tmp_path / name, *QUICK, *few, *start)
        agreed[name] = read_config(tmp_path / name).provenance["curve"][0]["agreement"]["recurrent-2"][0]
    config, weights = read_config(tmp_path / "narrow"), load_file(tmp_path / "narrow" / "model.safetensors")
    assert config.exits[0].intermediate_size == 24
    assert weights["exits.2.mlp.down.weight"].shape[1] == 24
    assert agreed["narrow"] > agreed["afresh"] + 0.02
    said = run(
        "train",
        model,
        "--records",
        records,
        "--out",
        tmp_path / "no",
        *QUICK,
        "--start-from",
        tmp_path / "narrow",
        code=2,
    )
    assert "train this kind, at most as wide" in said


def _one_cut(model: Path, text: Path, folder: Path) -> Path:
    out = folder / "one-cut"
    run("collect", model, "--engine", "transformers", "--data", text, "--out", out, "--exit-layer", "1")
    return out


def test_a_loss_that_is_not_a_number_is_said(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vllm_earlyexit.training import train

    monkeypatch.setitem(train.LOSSES, "kl", lambda logits, _: logits.sum() * float("nan"))
    said = run("train", model, "--records", records, "--out", tmp_path / "heads", *QUICK, code=2)
    assert "the loss is nan at step 1" in said
    assert not (tmp_path / "heads" / "config.json").exists()


def test_records_of_another_model_are_refused(records: Path, tmp_path: Path):
    other = tiny_model(tmp_path / "other", seed=1)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    said = run("train", other, "--records", records, "--out", tmp_path / "heads", code=2)
    assert "these records are of 'model', not of" in said


def test_bad_input_is_one_sentence(model: Path, text: Path, tmp_path: Path):
    collect = ("collect", model, "--engine", "transformers", "--exit-layer", "2")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "nothing to learn from in" in run(*collect, "--data", empty, "--out", tmp_path / "a", code=2)
    assert "cannot be read" in run(*collect, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "b", code=2)
    outside = run("collect", model, "--exit-layer", "4", "--data", text, "--out", tmp_path / "c", code=2)
    assert "exit layers must lie between 1 and 3" in outside
    assert not (tmp_path / "c").exists()
    foreign = tiny_model(tmp_path / "foreign")
    add_tokenizer(foreign, vocab_size=100)
    said = run("collect", foreign, *collect[2:], "--data", _words(tmp_path, 99), "--out", tmp_path / "d", code=2)
    assert "it is another model's tokenizer" in said
    assert "there is no kind of head 'tial'" in run(
        "train", model, "--records", tmp_path, "--out", tmp_path / "e", "--kind", "tial", code=2
    )


def _words(folder: Path, number: int) -> Path:
    path = folder / "words.jsonl"
    path.write_text(json.dumps({"id": 1, "text": " ".join([f"w{number}"] * 20)}))
    return path


def test_recording_takes_bounded_memory(model: Path, tmp_path: Path):
    """Fifteen times the text in shards of the same size: the peak must not grow by what was recorded."""
    script = (
        "import resource, sys; from pathlib import Path; from vllm_earlyexit.training.collect import *;"
        "collect_records(sys.argv[1], Path(sys.argv[2]), [2], data=[Path(sys.argv[3])], engine='transformers',"
        " options=CollectOptions(shard_tokens=2048));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks, sizes = [], []
    for name, lines in (("small", 100), ("large", 1500)):
        path = tmp_path / f"{name}.jsonl"
        line = " ".join(f"w{n % 64}" for n in range(100))
        path.write_text(
            "".join(json.dumps({"id": n, "text": f"w{n % 64} w{n // 64} {line}"}) + "\n" for n in range(lines))
        )
        command = [sys.executable, "-c", script, str(model), str(tmp_path / name), str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) * 1024)
        sizes.append(sum(shard.stat().st_size for shard in (tmp_path / name).glob("shard-*")))
    assert sizes[1] > 70e6
    assert peaks[1] < peaks[0] + 0.3 * sizes[1]
