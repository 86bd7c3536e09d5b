"""Text records: JSON lines with an ``id`` and ``turns`` (messages, user first), ``text``, or an answer's ``ids``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_earlyexit.errors import EarlyExitError


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file.

    Raises:
        EarlyExitError: a line is not a record; the message names the file and the line.
    """
    for record, _ in sized_records(path):
        yield record


def sized_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the records of a JSON-lines file, each with its size in bytes; raises as ``read_records`` does."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse(line, f"{path}, line {number}"), len(line)
    except OSError as error:
        raise EarlyExitError(f"{path} cannot be read ({error})") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise EarlyExitError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(record, dict) or "id" not in record or not ({"turns", "text", "ids"} & record.keys()):
        raise EarlyExitError(f'{where}: needs "id" and "turns" (a list of messages) or "text"')
    return record
