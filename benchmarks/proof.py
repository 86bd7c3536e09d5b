"""Whether rates that were measured in turns are those that the same engine has alone on the machine."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

TOLERANCE = 0.05


def proof(turns: Sequence[float], alone: Sequence[float]) -> dict[str, Any]:
    """Return what a record says of its rates in turns beside those of its engine alone, in tokens per second.

    ``believable`` is whether their medians differ by at most 5 %; None without turns.
    """
    by_itself = statistics.median(alone)
    over = statistics.median(turns) / by_itself if turns else None
    return {
        "alone_repeats": [round(rate, 2) for rate in alone],
        "alone_tokens_per_s": round(by_itself, 2),
        "turns_over_alone": None if over is None else round(over, 3),
        "believable": None if over is None else abs(over - 1) <= TOLERANCE,
    }


def doubted(records: Sequence[dict[str, Any]], name: str, rate: str, console: Console) -> bool:
    """Say which records cannot be believed; return whether there are any.

    Args:
        records: All of them.
        name: The key of what they are of.
        rate: The key of their rate in turns.
        console: Where to say it.
    """
    doubtful = [record for record in records if record["believable"] is False]
    for record in doubtful:
        console.print(
            f"[red]not believable: {record[name]} at {record['concurrency']} made {record[rate]:.1f} tokens/s in turns "
            f"and {record['alone_tokens_per_s']:.1f} alone, {record['turns_over_alone']:.2f} x[/red]",
            soft_wrap=True,
        )
    if doubtful:
        console.print("[red]something else used the machine; measure again when nothing does[/red]")
    return bool(doubtful)
