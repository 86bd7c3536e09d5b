"""What documents show of results: each table's text, and that documents are what results say."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

FOUND = {"provenance": {"cpu": "a CPU", "cores": 2}}


def record(
    config: str, concurrency: int = 1, ratios: tuple[float, ...] = (1.2, 1.1, 1.3), **other: Any
) -> dict[str, Any]:
    plain = config.startswith("ar")
    return {
        "config": config,
        "baseline": "ar@bfloat16",
        "model": "smollm2-135m-instruct",
        "dtype": "bfloat16",
        "prompts": "mtbench.jsonl",
        "context_tokens": 0,
        "concurrency": concurrency,
        "tokens_per_s": 20.0,
        "ms_per_token": 50.0,
        "speedup_vs_ar": None if plain else sorted(ratios)[len(ratios) // 2],
        "ratios": [] if plain else list(ratios),
        "repeats": [20.0] * len(ratios),
        "turns_over_alone": 1.01,
        "believable": True,
        **FOUND,
        **other,
    }


def write(root: Path, name: str, content: Any) -> None:
    path = root / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def document(root: Path, text: str) -> Path:
    path = root / "README.md"
    path.write_text(text)
    return path


def table(root: Path, what: str) -> list[str]:
    path = document(root, f"before\n\n<!-- table: {what} -->\n<!-- end of table -->\n\nafter\n")
    tables.main([], root)
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1], lines[-3]) == ("before", "after", "<!-- end of table -->")
    return lines[3:-3]


def refusal(root: Path, what: str) -> str:
    with pytest.raises(SystemExit) as ended:
        table(root, what)
    assert isinstance(ended.value.code, str)
    assert ended.value.code.startswith(f"README.md: table {what}: ")
    assert "\n" not in ended.value.code
    return ended.value.code


def throughput(root: Path, name: str, *records: dict[str, Any]) -> None:
    write(root, f"{name}/results.json", list(records))


def test_speed_has_a_row_for_each_configuration_below_plain_vllms_tokens_per_second(tmp_path: Path):
    lost = record("ar@float32", ratios=(), believable=None, turns_over_alone=None)
    eight = [record("ar@bfloat16", 8, tokens_per_s=90.0), record("self-exit", 8, (0.97, 1.0, 1.02))]
    throughput(tmp_path, "run", record("ar@bfloat16"), lost, record("self-exit"), *eight, record("ngram:1:4"))
    assert table(tmp_path, "speed run") == [
        "|  | 1 at a time | 8 at a time |",
        "| --- | --- | --- |",
        "| plain vLLM, tokens/s | 20.0 (bfloat16) | 90.0 (bfloat16) |",
        "| self-exit as it comes | 1.20 x (1.10 to 1.30) | 1.00 x (0.97 to 1.02) |",
        "| vLLM's prompt lookup, 4 tokens, matches from 1 | 1.20 x (1.10 to 1.30) |  |",
        "",
        "- [run](benchmarks/results/run/results.json): a CPU, 2 cores, 3 repeats",
    ]


def test_speed_of_several_runs_takes_the_fastest_of_a_kind_and_only_what_is_asked_for(tmp_path: Path):
    slow, fast = record("ngram:1:4"), record("ngram:2:16", ratios=(2.0, 2.1, 2.2))
    throughput(tmp_path, "one", record("ar@bfloat16"), record("ar@bfloat16", 8), record("self-exit"), slow, fast)
    throughput(tmp_path, "two", record("ar@bfloat16"), record("ngram:1:4"), record("heads-only"))
    assert table(tmp_path, "speed one two configs=ngram at=1")[:4] == [
        "|  | SmolLM2-135M on MT-Bench, 1 at a time | SmolLM2-135M on MT-Bench, 1 at a time |",
        "| --- | --- | --- |",
        "| plain vLLM, tokens/s | 20.0 (bfloat16) | 20.0 (bfloat16) |",
        "| vLLM's prompt lookup, at its best | 2.10 x (2.00 to 2.20) | 1.20 x (1.10 to 1.30) |",
    ]
    assert "nothing at 4 requests" in refusal(tmp_path, "speed one at=4")
    assert "there is no suffix in one, two" in refusal(tmp_path, "speed one two configs=suffix")


@pytest.mark.parametrize("config", ["ar@bfloat16", "self-exit"])
@pytest.mark.parametrize("wrong", [{"believable": False}, {"believable": None}, {"repeats": []}])
def test_what_cannot_be_believed_is_not_shown(tmp_path: Path, config: str, wrong: dict[str, Any]):
    records = [record("ar@bfloat16"), record("self-exit")]
    throughput(tmp_path, "run", *(one | wrong if one["config"] == config else one for one in records))
    assert f"{config} at 1 in run" in refusal(tmp_path, "speed run")


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path):
    throughput(tmp_path, "old", {"config": "self-exit", "concurrency": 1, "repeats": [1.0]})
    assert "there is no benchmarks/results/none/results.json" in refusal(tmp_path, "speed none")
    assert "there is no such table" in refusal(tmp_path, "sped old")
    assert "missing a required argument" in refusal(tmp_path, "repeatability old")
    assert "it names no results" in refusal(tmp_path, "speed at=1")
    assert "'baseline'" in refusal(tmp_path, "speed old")


def test_repeatability_shows_both_runs_and_what_is_furthest_off(tmp_path: Path):
    throughput(tmp_path, "a", record("ar@bfloat16"), record("self-exit"))
    again = record("self-exit", ratios=(1.1, 1.14, 1.2), turns_over_alone=0.97)
    throughput(tmp_path, "b", record("ar@bfloat16", tokens_per_s=24.0), again)
    assert table(tmp_path, "repeatability a b")[2:5] == [
        "| plain vLLM, bfloat16 | 1 | 20.0 tokens/s | 24.0 tokens/s | +20.0 % | 1.010 | 1.010 |",
        "| self-exit as it comes | 1 | 1.20 x | 1.14 x | -5.0 % | 1.010 | 0.970 |",
        "| furthest off, plain vLLM aside |  |  |  | -5.0 % | 1.010 | 0.970 |",
    ]


def test_contexts_has_a_row_for_each_context(tmp_path: Path):
    for name, tokens in (("long", 8192), ("short", 2048)):
        both = [record(config, context_tokens=tokens) for config in ("ar@bfloat16", "self-exit", "heads-only")]
        throughput(tmp_path, name, *both)
    assert table(tmp_path, "contexts long short")[:4] == [
        "| tokens of context | self-exit as it comes, 1 at a time | its heads alone, 1 at a time |",
        "| --- | --- | --- |",
        "| 2048 | 1.20 x (1.10 to 1.30) | 1.20 x (1.10 to 1.30) |",
        "| 8192 | 1.20 x (1.10 to 1.30) | 1.20 x (1.10 to 1.30) |",
    ]


def test_a_ramp_shows_the_lowest_window_of_each_stage(tmp_path: Path):
    stage = {"concurrency": 4, "stage": 0, "repeats": [1.0], "believable": True, **FOUND}
    plain = stage | {"server": "plain", "speedup": 1.0, "ratios": [1.0], "windows": [[1.0]], "lowest_window": 1.0}
    ours = stage | {"server": "ours", "speedup": 1.1, "ratios": [1.1], "windows": [[1.2, 0.9]], "lowest_window": 0.9}
    short = ours | {"stage": 1, "windows": [[]], "lowest_window": None}
    write(tmp_path, "ramp/results.json", [plain, short, ours])
    assert table(tmp_path, "ramp ramp")[2:4] == [
        "| 1 | 4 | ours | 1.10 x (1.10 to 1.10) | 2 | 0.90 x |",
        "| 2 | 4 | ours | 1.10 x (1.10 to 1.10) | 0 |  |",
    ]


def test_pays_says_for_each_model_whether_heads_alone_gain(tmp_path: Path):
    split = {"shallow": 6.0, "head": 4.0, "deep": 20.0, "lm_head": 5.0, "engine": 5.0}
    heads = record("heads-only", drafted=200, drafts=100, acceptance_length=1.5, ms_per_token_by_part=split)
    eight = [record("ar@bfloat16", 8), record("heads-only", 8, (0.99, 1.03, 1.04))]
    throughput(tmp_path, "run", record("ar@bfloat16"), heads, *eight)
    assert table(tmp_path, "pays run")[2:3] == [
        "| SmolLM2-135M on MT-Bench | 50.0 | 6.0 | 60.0 | 1.20 x (1.10 to 1.30) | yes | 1.03 x (0.99 to 1.04) | no |"
    ]
    throughput(tmp_path, "run", record("ar@bfloat16"), record("heads-only"), *eight)
    assert "| 50.0 |  |  | 1.20 x" in table(tmp_path, "pays run")[2]


def test_parts_shows_where_a_tokens_time_goes(tmp_path: Path):
    plain = record("ar@bfloat16", ms_per_token_by_part={"layers": 30.0, "lm_head": 5.0, "engine": 2.0})
    ours = record("self-exit", ms_per_token_by_part={"shallow": 3.0, "engine": 4.0})
    throughput(tmp_path, "run", plain, ours)
    assert table(tmp_path, "parts run")[:4] == [
        "| ms per token | all layers | layers below the cut | lm_head | the rest |",
        "| --- | --- | --- | --- | --- |",
        "| plain vLLM, bfloat16 | 30.0 |  | 5.0 | 2.0 |",
        "| self-exit as it comes |  | 3.0 |  | 4.0 |",
    ]


def test_the_demos_table(tmp_path: Path):
    speeds = {"ar_tokens_per_s": 20.0, "self_exit_tokens_per_s": 25.0, "speedup": 1.25}
    result = {**speeds, "ratios": [1.2, 1.25, 1.3], "repeats": 3, "identical": 19, "prompts": 20, **FOUND}
    write(tmp_path, "demo.json", result)
    assert table(tmp_path, "demo demo.json") == [
        "|  | plain vLLM | self-exit |",
        "| --- | --- | --- |",
        "| tokens/s | 20.0 | 25.0 |",
        "| x plain | 1 | 1.25 x (1.20 to 1.30) |",
        "| identical outputs |  | 19 of 20 |",
        "",
        "- [demo](benchmarks/results/demo.json): a CPU, 2 cores, 3 repeats",
    ]
    write(tmp_path, "demo.json", result | {"ratios": []})
    assert "has no repeats" in refusal(tmp_path, "demo demo.json")


def test_quality_shows_only_columns_that_say_something(tmp_path: Path):
    plain = {"config": "ar", "task": "humaneval", "tokens_per_s": 10.0, "score": 0.5, "standard_error": 0.1}
    early = {"early": 0.25, "agreement": 0.9}
    ours = plain | {"config": "early:resume:0.9", "tokens_per_s": 12.0, "score": 0.25, "early_exits": early}
    write(tmp_path, "run/quality.json", [plain | {"early_exits": None}, ours, ours | {"task": "other"}])
    assert table(tmp_path, "quality run task=humaneval")[:4] == [
        "|  | tokens/s | solved | early tokens | agreed |",
        "| --- | --- | --- | --- | --- |",
        "| plain vLLM | 10.0 | 50.0 % (10.0) |  |  |",
        "| accuracy 0.9, `resume`, with prompt lookup | 12.0 | 25.0 % (10.0) | 25.0 % | 90.0 % |",
    ]


def test_agreement_and_ablation(tmp_path: Path):
    exits = [{"exit_layer": 2, "agreement": [0.6, 0.5, 0.4, 0.3]}]
    write(tmp_path, "heads-a.json", {"base_model": "qwen", "tokens": 31238, "exits": exits})
    assert table(tmp_path, "agreement heads-a.json")[2:] == [
        "| a | Qwen2.5-Coder-0.5B | 2 | 31,238 | 60.0 % | 50.0 % | 40.0 % | 30.0 % |",
        "",
        "- [heads-a](benchmarks/results/heads-a.json)",
    ]
    row = {"row": "tail", "agreement": [0.3, 0.2, 0.1], "agreement_per_seed": [[], []]}
    write(tmp_path, "ablation.json", {"rows": [row]})
    assert table(tmp_path, "ablation ablation.json")[2] == "| tail | 2 | 30.0 % | 10.0 % |"


def test_numbers_in_sentences(tmp_path: Path):
    throughput(tmp_path, "run", record("ar@bfloat16"), record("self-exit"), record("heads-only", believable=False))
    write(tmp_path, "heads.json", {"exits": [{"agreement": [0.551, 0.4]}]})
    slowest, first = "value: run config=self-exit ratios/min .1f", "value: heads.json exits/0/agreement/0 .0%"
    path = document(tmp_path, f"At least <!-- {slowest} -->9<!-- /value --> x, <!-- {first} --><!-- /value -->.")
    tables.main([], tmp_path)
    filled = f"At least <!-- {slowest} -->1.1<!-- /value --> x, <!-- {first} -->55 %<!-- /value -->."
    assert path.read_text() == filled
    document(tmp_path, "<!-- value: run config=heads-only speedup_vs_ar -->1<!-- /value -->")
    with pytest.raises(SystemExit, match="cannot be believed"):
        tables.main([], tmp_path)
    document(tmp_path, "<!-- value: run concurrency=1 speedup_vs_ar -->1<!-- /value -->")
    with pytest.raises(SystemExit, match="3 records are like that"):
        tables.main([], tmp_path)


def test_a_mark_without_an_end_is_an_error(tmp_path: Path):
    throughput(tmp_path, "run", record("ar@bfloat16"), record("self-exit"))
    document(tmp_path, "<!-- table: speed run -->\n| a |\n")
    with pytest.raises(SystemExit, match="the end of a table or value is missing"):
        tables.main([], tmp_path)


def test_check_notices_a_changed_number_and_a_changed_file_and_writes_nothing(tmp_path: Path):
    throughput(tmp_path, "run", record("ar@bfloat16"), record("self-exit"))
    path = document(tmp_path, "<!-- table: speed run -->\n<!-- end of table -->\n")
    tables.main([], tmp_path)
    tables.main(["--check"], tmp_path)
    written = path.read_text()
    path.write_text(written.replace("1.20", "1.30"))
    with pytest.raises(SystemExit, match=r"README\.md: table speed run differs"):
        tables.main(["--check"], tmp_path)
    assert "1.30 x (1.10" in path.read_text()
    path.write_text(written)
    throughput(tmp_path, "run", record("ar@bfloat16"), record("self-exit", ratios=(1.4, 1.5, 1.6)))
    with pytest.raises(SystemExit, match=r"README\.md: table speed run differs"):
        tables.main(["--check"], tmp_path)
    assert path.read_text() == written


def test_documents_are_what_tables_writes_from_committed_results():
    tables.main(["--check"])
