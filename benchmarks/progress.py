"""What a long benchmark is doing, in a terminal and in a log."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


def progress_on(console: Console) -> Progress:
    """Return bars that are drawn once a second, so that drawing takes nothing from what is measured."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=1)


def say(progress: Progress, bar: TaskID, what: str) -> None:
    """Say what a bar is about now; where bars cannot be drawn, on a line of its own."""
    progress.update(bar, description=what)
    if not progress.console.is_terminal:
        progress.console.print(f"{what} ({int(progress.tasks[bar].completed)} of {progress.tasks[bar].total})")
