"""Let a model answer prompts and record what it computes on the way, as training data for its exit heads."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, track

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder, text_config
from vllm_earlyexit.training.data import Window, as_messages, cut, grouped, tokenize
from vllm_earlyexit.training.packs import Records
from vllm_earlyexit.training.records import read_records, sized_records
from vllm_earlyexit.training.shards import (
    Batch,
    RecordsConfig,
    Shard,
    concatenate,
    open_records,
    shards,
    window_key,
    write_shard,
)
from vllm_earlyexit.training.sources import Answer, CollectOptions, ServingSource, Source, TransformersSource, as_batch
from vllm_earlyexit.training.teacher import Teacher

Item = TypeVar("Item")
ANSWERS_FILE = "answers.jsonl"


@dataclass
class Collected:
    """What a run of ``collect_records`` did."""

    answers: int = 0
    tokens: int = 0
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
    records: Path | None = None,
    name: str | None = None,
    engine: str = "vllm",
    device: str = "cpu",
    console: Console | None = None,
) -> Collected:
    """Record the model on ``data`` and on its own answers to ``prompts`` into the records folder ``out``.

    With ``records``, what these hold is taken over first, and of the model only the layers up to the new exits are run.

    A run that was stopped goes on where it stopped: prompts that have an answer are not asked again, and windows
    that are in a whole shard are not run again. Damaged or foreign shards are named and skipped.

    Args:
        model: Folder or Hub id of the base model.
        out: Records folder, new or of this model.
        exit_layers: Cuts whose hidden states are kept.
        prompts: Files of records with ``turns``, all of them the user's.
        data: Files of records with ``text``, or with ``turns`` that alternate between user and assistant.
        options: Knobs.
        records: Records folder of the same model with other exits.
        name: Name of the base model to record, by default ``model``'s last path component.
        engine: ``vllm``, or ``transformers`` for ``data`` alone.
        device: For ``transformers``, which also runs the layers up to new exits of ``records``.
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
    collector = Collector(out, config, options, console)
    for message in collector.done.skipped:
        console.print(f"skipped: {message}", soft_wrap=True)
    if records is not None:
        collector.take_over(records, Teacher(folder, device))
        if not prompts and not data:
            return collector.done
    source: Source = (
        ServingSource(folder, config, options) if engine == "vllm" else TransformersSource(folder, config, device)
    )
    if prompts:
        collector.answer(source, prompts)
    sources = [*([out / ANSWERS_FILE] if (out / ANSWERS_FILE).exists() else []), *data]
    collector.record(source, sources)
    if not collector.known:
        raise EarlyExitError(f"nothing to learn from in {', '.join(map(str, [*prompts, *data])) or 'no files'}")
    return collector.done


class Collector:
    """A records folder that is being filled.

    Attributes:
        done: What this run did.
        known: Keys of the windows that are in a whole shard or about to be.
    """

    def __init__(self, out: Path, config: RecordsConfig, options: CollectOptions, console: Console):
        self._out, self._config, self._options, self._console = out, config, options, console
        self.done = Collected()
        self.known: set[int] = set()
        self._waiting: list[Batch] = []
        for shard in shards(out, config):
            if isinstance(shard, Shard):
                self.known.update(shard.windows[:, 1].tolist())
            else:
                self.done.skipped.append(str(shard))
        self._number = max((int(path.stem.split("-")[1]) for path in out.glob("shard-*.safetensors")), default=-1) + 1

    @property
    def full(self) -> bool:
        """Whether this run has recorded all the tokens that it was asked for."""
        return self._options.max_tokens is not None and self.done.tokens >= self._options.max_tokens

    def _write(self, batch: Batch) -> None:
        write_shard(self._out, self._number, self._config, batch)
        self._number += 1

    def take_over(self, folder: Path, teacher: Teacher) -> None:
        """Record what another folder holds of the same model; hidden states at cuts that it lacks are computed.

        Raises:
            EarlyExitError: it holds something else.
        """
        opened = Records([folder], lambda message: self._console.print(message, soft_wrap=True))
        theirs, ours = opened.config.model_dump(), self._config.model_dump()
        changed = [name for name in ours if name not in ("base_model", "exit_layers") and ours[name] != theirs[name]]
        if changed:
            raise EarlyExitError(
                f"{folder} holds records of {opened.config.base_model!r} with another {', '.join(changed)} than this "
                "run's; take over records of the same model and --top-k"
            )
        if (folder / ANSWERS_FILE).exists() and not (self._out / ANSWERS_FILE).exists():
            shutil.copy(folder / ANSWERS_FILE, self._out)
        kept = tuple(layer for layer in self._config.layers if layer in opened.config.layers)
        missing = [layer for layer in self._config.layers if layer not in kept]
        for shard in track(opened.shards, "taking over", console=self._console):
            if self.known.issuperset(shard.windows[:, 1].tolist()):
                continue
            batch = shard.read(0, len(shard.lengths), kept)
            self._write(replace(batch, hidden=batch.hidden | (teacher.states(batch, missing) if missing else {})))
            self.known.update(shard.windows[:, 1].tolist())
            self.done.tokens += len(batch.ids)

    def answer(self, source: Source, prompts: Sequence[Path]) -> None:
        """Have every user turn answered that has no answer yet, recording what the model computes meanwhile."""
        path = self._out / ANSWERS_FILE
        history = {(record["id"], record["turn"]): record["text"] for record in _whole_lines(path)}
        asked = [r for file in prompts for r in list(read_records(file))[: self._options.num_prompts] if "turns" in r]
        with (
            path.open("a", encoding="utf-8") as sink,
            Progress(*_columns("answering"), console=self._console) as progress,
        ):
            bar = progress.add_task("", total=sum(len(record["turns"]) for record in asked), rate="")
            began, spoken = progress.get_time(), 0
            for line, answer in self._answers(source, asked, history):
                sink.write(json.dumps(line) + "\n")
                sink.flush()
                self._keep(list(self._new_windows(line, source.tokenizer)), answer)
                self.done.answers, spoken = self.done.answers + 1, spoken + len(answer.ids)
                rate = spoken / max(1e-9, progress.get_time() - began)
                progress.update(bar, completed=len(history), rate=f"{rate:.0f} tokens/s")
                if self.full:
                    break
        self._flush()

    def _answers(
        self, source: Source, asked: list[dict[str, Any]], history: dict[tuple[str, int], str]
    ) -> Iterator[tuple[dict[str, Any], Answer]]:
        """Yield answers and their lines for the answers file, turn by turn; adds them to ``history``."""
        for turn in range(max((len(record["turns"]) for record in asked), default=0)):
            numbered = enumerate(record for record in asked if len(record["turns"]) > turn)
            todo = [(n, record) for n, record in numbered if (str(record["id"]), turn) not in history]
            ids = [_prompt_ids(record, turn, history, source.tokenizer) for _, record in todo]
            share = self._options.sampled
            sampled = [int(n * share) != int((n + 1) * share) for n, _ in todo]
            for answer in source.answer(ids, sampled, self._options) if todo else ():
                name, prompt = str(todo[answer.number][1]["id"]), ids[answer.number]
                text = source.tokenizer.decode(answer.ids, skip_special_tokens=True)
                history[name, turn] = text
                line = {"id": name, "turn": turn, "text": text, "ids": prompt + answer.ids}
                yield line | {"answer_start": len(prompt)}, answer

    def _keep(self, windows: list[Window], answer: Answer) -> None:
        """Keep what was observed of an answer until there is enough for a shard."""
        if answer.observed is None or not windows:
            return
        self._waiting.append(as_batch(windows, answer.observed))
        self.done.tokens += len(self._waiting[-1].ids)
        if sum(len(batch.ids) for batch in self._waiting) >= self._options.shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._write(concatenate(self._waiting))
            self._waiting = []

    def record(self, source: Source, paths: Sequence[Path]) -> None:
        """Run every window of ``paths`` that is not known yet through the model and write shards."""
        options = self._options
        self._check_room(paths)
        with Progress(*_columns("recording"), console=self._console) as progress:
            total = options.max_tokens or sum(path.stat().st_size for path in paths)
            bar = progress.add_task("", total=total, completed=self.done.tokens if options.max_tokens else 0, rate="")
            began = progress.get_time()

            def windows() -> Iterator[Window]:
                taken = self.done.tokens
                for record, size in _in_turns([sized_records(path) for path in paths]):
                    if options.max_tokens is not None and taken >= options.max_tokens:
                        return
                    for window in self._new_windows(record, source.tokenizer):
                        yield window
                        taken += len(window.ids)
                    if options.max_tokens is None:
                        progress.advance(bar, size)

            before = self.done.tokens
            for group in grouped(windows(), options.shard_tokens):
                self._write(source.observe(group))
                here = sum(len(window.ids) for window in group)
                self.done.tokens += here
                rate = (self.done.tokens - before) / max(1e-9, progress.get_time() - began)
                progress.update(bar, rate=f"{rate:.0f} tokens/s")
                if options.max_tokens is not None:
                    progress.advance(bar, here)

    def _new_windows(self, record: dict[str, Any], tokenizer: Any) -> Iterator[Window]:
        """Yield the windows of a record that are not known yet; they are from then on."""
        whole, vocab_size = tokenize(record, tokenizer), self._config.vocab_size
        if max(whole.ids, default=0) >= vocab_size:
            raise EarlyExitError(
                f"the tokenizer speaks of token {max(whole.ids)} and the model has {vocab_size}: "
                "it is another model's tokenizer"
            )
        for window in cut(whole, self._options.window):
            key = window_key(window)[1]
            if key not in self.known:
                self.known.add(key)
                yield window

    def _check_room(self, paths: Sequence[Path]) -> None:
        tokens = sum(path.stat().st_size for path in paths if path.name != ANSWERS_FILE) / 4  # four bytes a token
        tokens = min(tokens, self._options.max_tokens or tokens)
        needed, free = tokens * self._config.bytes_per_token / 1e9, shutil.disk_usage(self._out).free / 1e9
        if needed > free:
            raise EarlyExitError(
                f"these records will take about {needed:.1f} GB and {self._out} has {free:.1f} GB free; "
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
