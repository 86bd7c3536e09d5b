"""The documents' tables and numbers, written from committed results.

    python -m benchmarks.tables            # writes README.md, benchmarks/README.md and docs/*.md
    python -m benchmarks.tables --check    # changes nothing; exit status 1 if one of them would change

A table stands between lines of its own, ``<!-- table: NAME FILE … OPTION=VALUE … -->`` and ``<!-- end of table -->``.
NAME is one of ``TABLES``. Files and folders are in benchmarks/results/; a folder means the results.json in it, or the
quality.json. Options are lists with commas: ``configs=self-exit,ngram at=1,8``. A configuration without its numbers
(``ngram``) is the fastest of its kind, in each column.

A number in a sentence is ``<!-- value: FILE KEY=VALUE … FIELD FORMAT -->1.25<!-- /value -->``: of the one record whose
keys have these values, a field (``exits/0/agreement/0``, ``ratios/min``), in Python's format (``.1f``, ``.0%``).
"""

import argparse
import inspect
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(?m)^(?P<head><!-- table: (?P<what>.*?) -->\n)(?P<body>(?s:.*?))(?P<end><!-- end of table -->)$")
VALUE = re.compile(r"(?P<head><!-- value: (?P<what>.*?) -->)(?P<body>.*?)(?P<end><!-- /value -->)")
OPEN = re.compile(r"(?m)^<!-- table: |<!-- value: ")
NAMES = {
    "smollm2-135m-instruct": "SmolLM2-135M",
    "SmolLM2-135M-Instruct": "SmolLM2-135M",
    "smollm2": "SmolLM2-135M",
    "qwen2.5-coder-0.5b-instruct": "Qwen2.5-Coder-0.5B",
    "qwen": "Qwen2.5-Coder-0.5B",
    "mtbench": "MT-Bench",
    "humaneval": "HumanEval",
    "prompts": "MT-Bench",
}
PARTS = {
    "layers": "all layers",
    "shallow": "layers below the cut",
    "deep": "layers above it",
    "head": "exit head",
    "lm_head": "lm_head",
    "engine": "the rest",
}
WIDTH = 100
"""Longest line of a document that is not a table's row."""
GAIN = 1.02
"""Median of relative speeds from which on something gains, if every single one is above 1, too."""
Row = Sequence[str]
Record = dict[str, Any]


class Refused(Exception):
    """Something cannot be shown; one sentence says why."""


def named(name: str) -> str:
    """Return what documents call a model or a set of prompts."""
    return NAMES.get(name, name)


def words(config: str) -> str:
    """Return a configuration in words; without its numbers it is the fastest of its kind."""
    name, _, dtype = config.partition("@")
    kind, *numbers = name.split(":")
    match kind, numbers:
        case "ar", []:
            said = "plain vLLM"
        case "ar-sync", []:
            said = "plain vLLM without async scheduling"
        case "self-exit", []:
            said = "self-exit as it comes"
        case "heads-only", []:
            said = "its heads alone"
        case (("self-exit" | "heads-only"), [layer]):
            said = f"{words(kind)}, after layer {layer}"
        case "undrafted", []:
            said = "self-exit that never drafts"
        case "unpadded", []:
            said = "self-exit without padding"
        case "entropy", [*accuracy]:
            said = ", accuracy ".join(["self-exit up to the first unsure token", *accuracy])
        case "fixed", [layer, length]:
            said = f"LayerSkip's rule with these heads, {length} tokens after layer {layer}"
        case "fixed", []:
            said = "LayerSkip's rule with these heads, at its best"
        case "layerskip", [layer, length]:
            said = f"LayerSkip's rule and head, {length} tokens after layer {layer}"
        case "layerskip", []:
            said = "LayerSkip's rule and head, at its best"
        case "ngram", [least, length]:
            said = f"vLLM's prompt lookup, {length} tokens, matches from {least}"
        case "ngram", []:
            said = "vLLM's prompt lookup, at its best"
        case "suffix", [length]:
            said = f"vLLM's suffix decoding, {length} tokens"
        case "suffix", []:
            said = "vLLM's suffix decoding, at its best"
        case "transformers", [layer]:
            said = f"transformers' early exit after layer {layer}"
        case "transformers", []:
            said = "transformers' early exit, at its best"
        case "early", [fill_in, accuracy]:
            said = f"accuracy {accuracy}, `{fill_in}`, with prompt lookup"
        case "early-heads", [fill_in, accuracy]:
            said = f"accuracy {accuracy}, `{fill_in}`, heads alone"
        case "oracle", [fill_in]:
            said = f"an oracle, `{fill_in}`"
        case "depth", [layers]:
            said = f"the first {layers} layers alone"
        case _:
            said = f"`{name}`"
    return f"{said}, {dtype}" if dtype else said


def shown(record: Record) -> Record:
    """Return a record of a benchmark with turns if it can be believed.

    Raises:
        Refused: its rates in turns were not measured, or are not those of its engine alone.
    """
    who = f"{record.get('config', record.get('server'))} at {record['concurrency']} in {record['from']}"
    if not record.get("repeats"):
        raise Refused(f"{who} was not measured in turns")
    if record.get("believable") is not True:
        raise Refused(f"{who} cannot be believed: nothing shows that turns measured what it makes alone")
    return record


def ratio(record: Record | None, median: str = "speedup_vs_ar") -> str:
    """Return a record's median relative speed and the range of it."""
    if record is None:
        return ""
    ratios = shown(record)["ratios"]
    return f"{record[median]:.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


@dataclass(frozen=True)
class Benchmark:
    """Results of ``benchmarks.throughput``.

    Attributes:
        name: Its folder's.
        records: All of them.
    """

    name: str
    records: list[Record]

    @property
    def configs(self) -> list[str]:
        """All configurations but plain vLLM."""
        return [config for config in dict.fromkeys(r["config"] for r in self.records) if not plain(config)]

    @property
    def title(self) -> str:
        """What it was measured on."""
        first = self.records[0]
        title = f"{named(first['model'])} on {named(Path(first['prompts']).stem)}"
        return f"{title}, {context} tokens of context" if (context := first.get("context_tokens")) else title

    def widths(self, at: Sequence[int] = ()) -> list[int]:
        """Return requests at a time, rising: these, or all that there are."""
        found = sorted({record["concurrency"] for record in self.records})
        if missing := [width for width in at if width not in found]:
            raise Refused(f"{self.name} has nothing at {missing[0]} requests at a time")
        return list(at) or found

    def find(self, config: str, width: int) -> Record | None:
        """Return the record of a configuration, or of the fastest one of a kind, None if there is none."""
        there = [record for record in self.records if record["concurrency"] == width]
        found = [record for record in there if record["config"] == config]
        found = found or [record for record in there if record["config"].split(":")[0] == config]
        return max(map(shown, found), key=lambda record: record["speedup_vs_ar"] or 0.0, default=None)

    def baseline(self, width: int) -> Record:
        """Return the record of the plain vLLM that others are compared with."""
        name = next((record["baseline"] for record in self.records if record["concurrency"] == width), "ar")
        if (found := self.find(name, width)) is None:
            raise Refused(f"{self.name} has no {name} at {width} requests at a time")
        return found


def plain(config: str) -> bool:
    """Return whether a configuration is plain vLLM, in whichever dtype."""
    return config.split("@")[0] == "ar"


@dataclass
class Results:
    """Committed results.

    Attributes:
        folder: Where they are.
        used: Those that were read, with the file of each.
    """

    folder: Path
    used: dict[Path, Any] = field(default_factory=dict)

    def read(self, name: str) -> Any:
        """Return what a file says, or that of a folder."""
        inside = [self.folder / name / file for file in ("results.json", "quality.json")]
        path = self.folder / name if name.endswith(".json") else next(filter(Path.exists, inside), inside[0])
        try:
            found = json.loads(path.read_text())
        except OSError:
            raise Refused(f"there is no {path.relative_to(self.folder.parents[1])}") from None
        except ValueError:
            raise Refused(f"{path.relative_to(self.folder.parents[1])} is not JSON") from None
        self.used[path] = found
        return found

    def records(self, name: str) -> list[Record]:
        """Return a folder's records, each with the name that it is from."""
        return [record | {"from": name} for record in self.read(name)]

    def benchmark(self, name: str) -> Benchmark:
        """Return the results of ``benchmarks.throughput`` in a folder."""
        return Benchmark(name, self.records(name))

    def sources(self, document: Path) -> list[str]:
        """Return a line for each file that was used: a link from the document, and the machine."""
        found = []
        for path, content in self.used.items():
            records = content if isinstance(content, list) else [content]
            source, repeats = records[0].get("provenance", {}), max(len(r.get("ratios") or ()) for r in records)
            about = [source["cpu"], f"{source['cores']} core" + "s" * (source["cores"] > 1)] if "cpu" in source else []
            about += [f"{repeats} repeats"] if repeats else []
            name = path.stem if path.parent == self.folder else path.parent.name
            line = f"- [{name}]({Path(os.path.relpath(path, document.parent)).as_posix()})"
            whole = f"{line}: {', '.join(about)}" if about else line
            found += [whole] if len(whole) <= WIDTH else [f"{line}:", f"  {', '.join(about)}"]
        return found


def speed(results: Results, *folders: str, configs: str = "", at: str = "") -> list[Row]:
    """Relative speeds: configurations by requests at a time, below plain vLLM's tokens per second."""
    runs = [results.benchmark(folder) for folder in folders]
    columns = [(run, width) for run in runs for width in run.widths(numbers(at))]
    bases = [run.baseline(width) for run, width in columns]
    several = len(runs) > 1
    titles = [f"{run.title}, {width} at a time" if several else f"{width} at a time" for run, width in columns]
    speeds = [f"{base['tokens_per_s']:.1f} ({base['dtype']})" for base in bases]
    rows: list[Row] = [["", *titles], ["plain vLLM, tokens/s", *speeds]]
    for config in listed(configs) or dict.fromkeys(config for run in runs for config in run.configs):
        cells = [ratio(run.find(config, width)) for run, width in columns]
        if not any(cells):
            raise Refused(f"there is no {config} in {', '.join(folders)}")
        rows.append([words(config), *cells])
    return rows


def repeatability(results: Results, first: str, second: str) -> list[Row]:
    """Two runs of one benchmark: medians and how far they are apart, and turns over alone in both."""
    runs = [results.benchmark(first), results.benchmark(second)]
    rows: list[Row] = [["", "at a time", first, second, "difference", "turns / alone", "turns / alone, again"]]
    most, off = 0.0, [1.0, 1.0]
    for width in runs[0].widths():
        bases = [run.baseline(width) for run in runs]
        pairs = [(bases, "tokens_per_s", ".1f", " tokens/s")]
        for config in runs[0].configs:
            pair = [run.find(config, width) for run in runs]
            if all(pair):
                pairs.append((pair, "speedup_vs_ar", ".2f", " x"))
        for pair, key, form, unit in pairs:
            one, other = (record[key] for record in pair)
            turns = [record["turns_over_alone"] for record in pair]
            off = [max(far, over, key=lambda value: abs(value - 1)) for far, over in zip(off, turns, strict=True)]
            most = most if pair is bases else max(most, other / one - 1, key=abs)
            medians = [f"{value:{form}}{unit}" for value in (one, other)]
            over = [f"{value:.3f}" for value in turns]
            rows.append([words(pair[0]["config"]), str(width), *medians, percent(other / one - 1, "+"), *over])
    rows.append(["furthest off, plain vLLM aside", "", "", "", percent(most, "+"), *(f"{far:.3f}" for far in off)])
    return rows


def contexts(results: Results, *folders: str, configs: str = "self-exit,heads-only") -> list[Row]:
    """Relative speeds by tokens of context."""
    runs = sorted(map(results.benchmark, folders), key=lambda run: run.records[0]["context_tokens"])
    widths = sorted({width for run in runs for width in run.widths()})
    columns = [(config, width) for config in listed(configs) for width in widths]
    rows = [["tokens of context", *(f"{words(config)}, {width} at a time" for config, width in columns)]]
    for run in runs:
        label = str(run.records[0]["context_tokens"] or "prompts as they are")
        for width in run.widths():
            run.baseline(width)
        rows.append([label, *(ratio(run.find(config, width)) for config, width in columns)])
    return rows


def ramp(results: Results, folder: str) -> list[Row]:
    """Stages of a ramp: relative speeds, and that of the worst ten seconds."""
    records = results.records(folder)
    rows: list[Row] = [["stage", "at a time", "server", "x plain", "windows of 10 s", "lowest window"]]
    for record in sorted(map(shown, records), key=lambda record: record["stage"]):
        if record["server"] != records[0]["server"]:
            lowest, count = record["lowest_window"], sum(map(len, record["windows"]))
            worst = "" if lowest is None else f"{lowest:.2f} x"
            stage = [str(record["stage"] + 1), str(record["concurrency"]), record["server"]]
            rows.append([*stage, ratio(record, "speedup"), str(count), worst])
    return rows


def pays(results: Results, *folders: str, at: str = "1,8") -> list[Row]:
    """Models for which heads alone gain, with what a step, a draft step and a round take one request at a time."""
    widths = numbers(at)
    gains = [head for width in widths for head in (f"heads alone, {width} at a time", "gain")]
    rows = [["", "plain step, ms", "draft step, ms", "round with drafts, ms", *gains]]
    for run in map(results.benchmark, folders):
        cells = [run.title, f"{run.baseline(1)['ms_per_token']:.1f}", *draft_times(run)]
        for width in widths:
            record = run.find("heads-only", width)
            gain = record and record["speedup_vs_ar"] > GAIN and min(record["ratios"]) > 1
            cells += [ratio(record), "" if record is None else "yes" if gain else "no"]
        if not any(cells[4:]):
            raise Refused(f"there is no heads-only in {run.name}")
        rows.append(cells)
    return rows


def draft_times(run: Benchmark) -> list[str]:
    """Return the milliseconds of a draft step and of a round with K drafts, one request at a time, if known.

    They are those of LayerSkip's rule, which drafts in every round, or else of the heads alone, as if these did. K + 1
    tokens go below the cut, one by one, and the head is asked K times.
    """
    record = next(filter(None, (run.find(config, 1) for config in ("fixed", "heads-only"))), None)
    split = record and record.get("ms_per_token_by_part")
    if not record or not split or not record["drafts"]:
        return ["", ""]
    length, tokens = record["drafted"] / record["drafts"], record["acceptance_length"]
    step = tokens * (split["shallow"] / (length + 1) + split["head"] / length)
    return [f"{step:.1f}", f"{tokens * sum(split.values()):.1f}"]


def parts(results: Results, folder: str) -> list[Row]:
    """Milliseconds per token by part of a step, one request at a time."""
    run = results.benchmark(folder)
    records = [run.find(config, 1) for config in (run.baseline(1)["config"], *run.configs)]
    found = [record for record in records if record and "ms_per_token_by_part" in record]
    used = [part for part in PARTS if any(part in record["ms_per_token_by_part"] for record in found)]
    rows: list[Row] = []
    for record in found:
        split = record["ms_per_token_by_part"]
        rows.append([words(record["config"]), *(f"{split[part]:.1f}" if part in split else "" for part in used)])
    return [["ms per token", *(PARTS[part] for part in used)], *rows]


def demo(results: Results, file: str) -> list[Row]:
    """The demo's result."""
    found = results.read(file)
    if not found.get("ratios"):
        raise Refused(f"{file} has no repeats")
    return [
        ["", "plain vLLM", "self-exit"],
        ["tokens/s", f"{found['ar_tokens_per_s']:.1f}", f"{found['self_exit_tokens_per_s']:.1f}"],
        ["x plain", "1", ratio(found | {"concurrency": 1, "from": file, "believable": True}, "speedup")],
        ["identical outputs", "", f"{found['identical']} of {found['prompts']}"],
    ]


def quality(results: Results, *folders: str, task: str = "") -> list[Row]:
    """What early exits cost and save: speed, score, and tokens that left.

    It has no relative speeds: ``benchmarks.quality`` runs configurations once, one after the other.
    """
    records = [record for folder in folders for record in results.records(folder) if task in ("", record["task"])]
    columns = ["tokens/s", "solved", "first choice", "log-probability", "early tokens", "agreed"]
    rows: list[Row] = []
    for record in records:
        early, score, likely = record["early_exits"] or {}, record["score"], record.get("log_likelihood_per_token")
        rows.append(
            [
                words(record["config"]),
                f"{record['tokens_per_s']:.1f}",
                "" if score is None else f"{percent(score)} ({100 * record['standard_error']:.1f})",
                percent(record.get("full_model_choice")),
                "" if likely is None else f"{likely:.3f}",
                percent(early.get("early")),
                percent(early.get("agreement")),
            ]
        )
    if not rows:
        raise Refused(f"there is no {task} in {', '.join(folders)}")
    filled = [0, *(n for n in range(1, len(columns) + 1) if any(row[n] for row in rows))]
    return [[row[n] for n in filled] for row in (["", *columns], *rows)]


def agreement(results: Results, *files: str) -> list[Row]:
    """How often heads agree with the full model, by draft position."""
    rows = [["heads", "model", "exit after layer", "tokens scored", *(f"position {n}" for n in (1, 2, 3, 4))]]
    for file in files:
        found = results.read(file)
        about = [file.removesuffix(".json").removeprefix("heads-"), named(found["base_model"])]
        for each in found["exits"]:
            rows.append([*about, str(each["exit_layer"]), f"{found['tokens']:,}", *map(percent, each["agreement"])])
    return rows


def ablation(results: Results, file: str) -> list[Row]:
    """What choices of training are worth: agreement at the first and the fourth draft position."""
    rows = [["", "seeds", "position 1", "position 4"]]
    for row in results.read(file)["rows"]:
        first, *_, last = row["agreement"]
        rows.append([row["row"], str(len(row["agreement_per_seed"])), percent(first), percent(last)])
    return rows


TABLES: dict[str, Callable[..., list[Row]]] = {
    table.__name__: table
    for table in (speed, repeatability, contexts, ramp, pays, parts, demo, quality, agreement, ablation)
}


def percent(share: float | None, sign: str = "-") -> str:
    """Return a share in percent, nothing if there is none; ``sign`` as in Python's formats."""
    return "" if share is None else f"{share:{sign}.1%}".replace("%", " %")


def listed(text: str) -> list[str]:
    """Return what stands between commas."""
    return text.split(",") if text else []


def numbers(text: str) -> list[int]:
    """Return the numbers between commas."""
    try:
        return [int(part) for part in listed(text)]
    except ValueError:
        raise Refused(f"{text} is not a list of numbers") from None


def table(what: str, document: Path, folder: Path) -> str:
    """Return the lines between a table's marks, with a link to each of its results."""
    name, *arguments = shlex.split(what)
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if name not in TABLES:
        raise Refused(f"there is no such table; there are {', '.join(TABLES)}")
    results, names = Results(folder), [argument for argument in arguments if "=" not in argument]
    if not names:
        raise Refused("it names no results")
    try:
        inspect.signature(TABLES[name]).bind(results, *names, **options)
    except TypeError as error:
        raise Refused(str(error)) from None
    head, *rows = TABLES[name](results, *names, **options)
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", *results.sources(document), ""])


def value(what: str, folder: Path) -> str:
    """Return a number of a sentence."""
    name, *rest = shlex.split(what)
    keys = [part.split("=", 1) for part in rest if "=" in part]
    at, *form = [part for part in rest if "=" not in part] or [""]
    found = Results(folder).read(name)
    if isinstance(found, list):
        chosen = [record for record in found if all(str(record.get(key)) == wanted for key, wanted in keys)]
        if len(chosen) != 1:
            raise Refused(f"{len(chosen)} records are like that, instead of one")
        found = shown(chosen[0] | {"from": name}) if "repeats" in chosen[0] else chosen[0]
    for part in at.split("/"):
        if isinstance(found, list) and part in ("min", "max"):
            found = min(found) if part == "min" else max(found)
        else:
            found = found[int(part)] if isinstance(found, list) else found[part]
    return format(found, *form).replace("%", " %")


def renewed(document: Path, root: Path) -> tuple[str, list[str], list[str]]:
    """Return a document with its tables and numbers as results say, what differs, and what cannot be shown."""
    text, folder, where = document.read_text(), root / "benchmarks" / "results", document.relative_to(root)
    differs, refused, done = [], [], 0

    def filled(kind: str, make: Callable[[str], str]) -> Callable[[re.Match[str]], str]:
        def fill(match: re.Match[str]) -> str:
            nonlocal done
            done, name = done + 1, f"{where}: {kind} {match['what']}"
            try:
                new = make(match["what"])
            except Refused as error:
                refused.append(f"{name}: {error}")
                return match[0]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                refused.append(f"{name}: these results do not have what it shows ({error!r})")
                return match[0]
            if new != match["body"]:
                differs.append(f"{name} differs from its results")
            return match["head"] + new + match["end"]

        return fill

    marks = len(OPEN.findall(text))
    text = TABLE.sub(filled("table", lambda what: table(what, document, folder)), text)
    text = VALUE.sub(filled("value", lambda what: value(what, folder)), text)
    if done != marks:
        refused.append(f"{where}: the end of a table or value is missing")
    return text, differs, refused


def documents(root: Path) -> list[Path]:
    """Return the documents that are written."""
    readmes = (root / "README.md", root / "benchmarks" / "README.md")
    return [*filter(Path.exists, readmes), *sorted((root / "docs").glob("*.md"))]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Write all documents, or check them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
    parser.add_argument("--check", action="store_true", help="Change nothing; say what differs.")
    check = parser.parse_args(arguments).check
    wrong: list[str] = []
    for document in documents(root):
        text, differs, refused = renewed(document, root)
        wrong += refused
        if check:
            wrong += differs
        elif differs:
            document.write_text(text)
            print(f"wrote {document.relative_to(root)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
