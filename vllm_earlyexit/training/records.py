"""Text records: JSON lines with an ``id`` and either ``turns`` (messages, user first) or ``text``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file.

    Raises:
        ValueError: a line is not a record; the message names the file and the line.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
            if not isinstance(record, dict) or "id" not in record or not ({"turns", "text"} & record.keys()):
                raise ValueError(f'{path}, line {number}: needs "id" and "turns" (a list of messages) or "text"')
            yield record
