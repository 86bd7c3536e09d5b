"""From text records to token windows that say what is learned."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

LEAST_SCORED = 8
"""Windows with fewer scored tokens are not worth a forward pass."""


@dataclass(frozen=True)
class Window:
    """A stretch of one record.

    Attributes:
        ids: Token ids.
        scored: For each token, whether what follows it is learned: all of a text, only the answers of a conversation.
        document: What the stretch is from; documents as a whole are trained on or held out.
        start: Where in the record it begins.
    """

    ids: list[int]
    scored: list[bool]
    document: str = ""
    start: int = 0


def tokenize(record: dict[str, Any], tokenizer: Any) -> Window:
    """Return one record as a single window; conversations go through the tokenizer's chat template."""
    document = str(record["id"])
    if "ids" in record:  # the model's own answer, tokens as it said them
        said, first = record["ids"][:-1], record["answer_start"] - 1  # nobody knows what follows the last token
        return Window(said, [n >= first for n in range(len(said))], document)
    if "text" in record:
        text = tokenizer(record["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return Window(text, [True] * len(text), document)
    messages = as_messages(record["turns"])
    ids: list[int] = []
    scored: list[bool] = []
    for n, message in enumerate(messages):
        answer = message["role"] == "assistant"
        upto = tokenizer.apply_chat_template(
            messages[: n + 1], add_generation_prompt=not answer, tokenize=True, return_dict=False
        )
        new = upto[len(ids) :]
        if answer and scored:
            scored[-1] = True  # the answer's first token is predicted at the last token of the prompt
        ids, scored = upto, scored + [answer] * len(new)
    return Window(ids, scored, document)


def as_messages(turns: list[str]) -> list[dict[str, str]]:
    """Return alternating turns, the user's first, as chat messages."""
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def cut(whole: Window, length: int) -> Iterator[Window]:
    """Yield the stretches of at most ``length`` tokens in which there is something to learn."""
    for start in range(0, len(whole.ids), length):
        end = start + length
        part = Window(whole.ids[start:end], whole.scored[start:end], whole.document, start)
        if sum(part.scored) >= LEAST_SCORED:
            yield part


def grouped(windows: Iterable[Window], tokens: int) -> Iterator[list[Window]]:
    """Yield consecutive windows in groups of at most ``tokens`` tokens, or of one window."""
    group: list[Window] = []
    size = 0
    for window in windows:
        if group and size + len(window.ids) > tokens:
            yield group
            group, size = [], 0
        group.append(window)
        size += len(window.ids)
    if group:
        yield group
