"""Result files: what was measured, and where it comes from."""

import json
from pathlib import Path
from typing import Any

from rich import print_json

from vllm_earlyexit.provenance import provenance


def write_result(path: Path, module: str, measured: dict[str, Any]) -> None:
    """Write ``measured`` with the run's provenance as JSON, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured | {"provenance": provenance(f"python -m benchmarks.{module}")}, indent=2)
    path.write_text(text + "\n")
    print_json(text)
