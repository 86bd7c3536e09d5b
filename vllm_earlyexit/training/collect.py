"""Let a model answer prompts and record what it computes on the way, as training data for its exit heads."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder, text_config
from vllm_earlyexit.training.data import Window, as_messages, cut, grouped, tokenize
from vllm_earlyexit.training.records import read_records, sized_records
from vllm_earlyexit.training.shards import RecordsConfig, Shard, open_records, shards, window_key, write_shard
from vllm_earlyexit.training.sources import CollectOptions, ServingSource, Source, TransformersSource

Item = TypeVar("Item")
ANSWERS_FILE = "answers.jsonl"


@dataclass
class Collected:
    """What a run of ``collect_records`` did."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)


def records_config(folder: Path, name: str, exit_layers: Sequence[int], top_k: int) -> RecordsConfig:
    """Return the config of records of the model in ``folder``.

    Raises:
        EarlyExitError: an exit layer lies outside the model.
    """
    config = text_config(folder)
    layers, num_layers = sorted(set(exit_layers)), config["num_hidden_layers"]
    if not layers or layers[0] < 1 or layers[-1] >= num_layers:
        raise EarlyExitError(
            f"exit layers must lie between 1 and {num_layers - 1} for this model, got {list(exit_layers)}"
        )
    return RecordsConfig(
        base_model=name,
        fingerprint=fingerprint(folder),
        exit_layers=tuple(layer for layer in layers if layer != num_layers - 1),
        num_layers=num_layers,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        top_k=top_k,
    )


def collect_records(
    model: str,
    out: Path,
    exit_layers: Sequence[int],
    prompts: Sequence[Path] = (),
    data: Sequence[Path] = (),
    options: CollectOptions = CollectOptions(),
    *,
    name: str | None = None,
    engine: str = "vllm",
    device: str = "cpu",
    console: Console | None = None,
) -> Collected:
    """Record the model on ``data`` and on its own answers to ``prompts`` into the records folder ``out``.

    A run that was stopped goes on where it stopped: prompts that have an answer are not asked again, and windows
    that are in a whole shard are not run again. Damaged or foreign shards are named and skipped.

    Args:
        model: Folder or Hub id of the base model.
        out: Records folder, new or of this model.
        exit_layers: Cuts whose hidden states are kept.
        prompts: Files of records with ``turns``, all of them the user's.
        data: Files of records with ``text``, or with ``turns`` that alternate between user and assistant.
        options: Knobs.
        name: Name of the base model to record, by default ``model``'s last path component.
        engine: ``vllm``, or ``transformers`` for ``data`` alone.
        device: For ``transformers``.
        console: Where progress and skipped shards are reported.

    Raises:
        EarlyExitError: input that cannot be used, a model or folder that does not fit, a full disk.
    """
    console = console or Console()
    for path in [*prompts, *data]:
        if not path.is_file():
            raise EarlyExitError(f"{path} cannot be read: there is no such file")
    folder = model_folder(model)
    config = records_config(folder, name or Path(model).name, exit_layers, options.top_k)
    open_records(out, config)
    collected = Collected()
    known, number = _known_windows(out, config, collected)
    for message in collected.skipped:
        console.print(f"skipped: {message}", soft_wrap=True)
    source: Source = (
        ServingSource(folder, config, options) if engine == "vllm" else TransformersSource(folder, config, device)
    )
    if prompts:
        collected.answers = _answer(source, prompts, out / ANSWERS_FILE, options, console)
    sources = [*([out / ANSWERS_FILE] if (out / ANSWERS_FILE).exists() else []), *data]
    _check_room(out, config, sources, options)
    _record(source, sources, out, config, options, known, number, collected, console)
    if not known:
        raise EarlyExitError(f"nothing to learn from in {', '.join(map(str, [*prompts, *data])) or 'no files'}")
    return collected


def _known_windows(out: Path, config: RecordsConfig, collected: Collected) -> tuple[set[int], int]:
    known: set[int] = set()
    for shard in shards(out, config):
        if isinstance(shard, Shard):
            known.update(shard.windows[:, 1].tolist())
        else:
            collected.skipped.append(str(shard))
    numbers = [int(path.stem.split("-")[1]) for path in out.glob("shard-*.safetensors")]
    return known, max(numbers, default=-1) + 1


def _check_room(out: Path, config: RecordsConfig, sources: Sequence[Path], options: CollectOptions) -> None:
    tokens = sum(path.stat().st_size for path in sources) / 4  # English has about four bytes a token
    tokens = min(tokens, options.max_tokens or tokens)
    needed, free = tokens * config.bytes_per_token / 1e9, shutil.disk_usage(out).free / 1e9
    if needed > free:
        raise EarlyExitError(
            f"these records will take about {needed:.1f} GB and {out} has {free:.1f} GB free; "
            "give --max-tokens, fewer exit layers or another folder"
        )


def _columns(label: str) -> tuple[Any, ...]:
    return (
        TextColumn(label),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )


def _answer(source: Source, prompts: Sequence[Path], out: Path, options: CollectOptions, console: Console) -> int:
    """Append an answer for every user turn that has none yet; return how many were added."""
    history = {(record["id"], record["turn"]): record["text"] for record in _whole_lines(out)}
    asked = [r for path in prompts for r in list(read_records(path))[: options.num_prompts] if "turns" in r]
    added = spoken = 0
    with out.open("a", encoding="utf-8") as sink, Progress(*_columns("answering"), console=console) as progress:
        bar = progress.add_task("", total=sum(len(record["turns"]) for record in asked), rate="")
        started = progress.get_time()
        for turn in range(max((len(record["turns"]) for record in asked), default=0)):
            todo = [
                (n, record)
                for n, record in enumerate(asked)
                if len(record["turns"]) > turn and (str(record["id"]), turn) not in history
            ]
            for start in range(0, len(todo), 512):
                part = todo[start : start + 512]
                ids = [_prompt_ids(record, turn, history, source.tokenizer) for _, record in part]
                sampled = [int(n * options.sampled) != int((n + 1) * options.sampled) for n, _ in part]
                for (_, record), prompt, answer in zip(part, ids, source.answer(ids, sampled, options), strict=True):
                    text = source.tokenizer.decode(answer, skip_special_tokens=True)
                    history[str(record["id"]), turn] = text
                    line = {"id": str(record["id"]), "turn": turn, "text": text}
                    sink.write(json.dumps(line | {"ids": prompt + answer, "answer_start": len(prompt)}) + "\n")
                    added, spoken = added + 1, spoken + len(answer)
                sink.flush()
                rate = spoken / max(1e-9, progress.get_time() - started)
                progress.update(bar, completed=len(history), rate=f"{rate:.0f} tokens/s")
    return added


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield an answers file's records; a last line that a killed run left unfinished is cut off."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    yield from read_records(path)


def _prompt_ids(record: dict[str, Any], turn: int, history: dict[tuple[str, int], str], tokenizer: Any) -> list[int]:
    turns: list[str] = []
    for n in range(turn):
        turns += [record["turns"][n], history[str(record["id"]), n]]
    messages = as_messages([*turns, record["turns"][turn]])
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def _in_turns(sources: list[Iterator[Item]]) -> Iterator[Item]:
    """Yield one item of each source in turn, so that any beginning of it is a mixture."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _record(
    source: Source,
    paths: Sequence[Path],
    out: Path,
    config: RecordsConfig,
    options: CollectOptions,
    known: set[int],
    number: int,
    collected: Collected,
    console: Console,
) -> None:
    """Run every window that is not in ``known`` and write shards from ``number`` on; adds to ``known``."""
    with Progress(*_columns("recording"), console=console) as progress:
        total = options.max_tokens or sum(path.stat().st_size for path in paths)
        bar = progress.add_task("", total=total, rate="")
        started = progress.get_time()

        def windows() -> Iterator[Window]:
            taken = 0
            for record, size in _in_turns([sized_records(path) for path in paths]):
                whole = tokenize(record, source.tokenizer)
                if max(whole.ids, default=0) >= config.vocab_size:
                    raise EarlyExitError(
                        f"the tokenizer speaks of token {max(whole.ids)} and the model has {config.vocab_size}: "
                        "it is another model's tokenizer"
                    )
                for window in cut(whole, options.window):
                    key = window_key(window)[1]
                    if key not in known:
                        known.add(key)
                        yield window
                        taken += len(window.ids)
                        if options.max_tokens is not None and taken >= options.max_tokens:
                            return
                if options.max_tokens is None:
                    progress.advance(bar, size)

        for group in grouped(windows(), options.shard_tokens):
            write_shard(out, number, config, source.observe(group))
            number += 1
            tokens = sum(len(window.ids) for window in group)
            collected.tokens += tokens
            collected.seconds = progress.get_time() - started
            progress.update(bar, rate=f"{collected.tokens / collected.seconds:.0f} tokens/s")
            if options.max_tokens is not None:
                progress.advance(bar, tokens)
