"""The model card of a heads checkpoint: one page that a user reads before serving."""

from collections.abc import Iterator
from pathlib import Path

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import (
    WEIGHTS_FILE,
    Calibration,
    ExitHeadConfig,
    Heads,
    load_heads,
    write_config,
    write_whole,
)

PICTURES = {
    "learning-curve.png": "Held-out agreement along training",
    "reliability.png": "Predicted against measured acceptance",
    "risk-coverage.png": "Share of rejected drafts against share of tokens drafted, surest first",
}


def write_report(folder: Path, note: str = "") -> Path:
    """Write README.md into a heads checkpoint from its config, weights and pictures; return its path.

    Args:
        folder: The checkpoint.
        note: What else a user should know of the training data; kept in the config for later reports.

    Raises:
        EarlyExitError: it is not a heads checkpoint, or it is not calibrated.
    """
    heads = load_heads(folder)
    if not all(exit_config.calibration for exit_config in heads.config.exits):
        raise EarlyExitError(f"{folder} is not calibrated; run 'vllm-earlyexit calibrate' first")
    if note:
        heads.config.provenance["note"] = note
        write_config(heads.config, folder)
    write_whole(folder / "README.md", "\n".join(_page(heads, folder)).encode())
    return folder / "README.md"


def _page(heads: Heads, folder: Path) -> Iterator[str]:
    config, provenance = heads.config, heads.config.provenance
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    yield f"# Exit heads for {config.base_model}\n"
    yield "Made with vllm-earlyexit: the model drafts tokens after its first layers and verifies them with the rest."
    yield f"Outputs are those of the model alone. {WEIGHTS_FILE} is {size:.1f} MB: the trained weights, without which"
    yield "there is nothing to draft with. Loading it runs no code and unpickles nothing.\n"
    yield f"    vllm serve {config.base_model} --speculative-model '[self-exit]:{folder.name}'\n"
    yield "| exit after layer | kind | head, M weights | draft step / full pass | agreement per draft position |"
    yield "| --- | --- | --- | --- | --- |"
    for exit_config in config.exits:
        yield _row(heads, exit_config)
    yield f"\nAgreement: share of {_tokens(config.exits[0])} held-out tokens on which head and full model choose"
    yield "alike, at draft positions 1, 2, …, with the drafts before accepted. A draft step's cost counts weights read,"
    yield f"lm_head's rows for the draft vocabulary included: {config.draft_vocab_size} of {config.vocab_size} tokens,"
    yield f"which hold {provenance.get('draft_vocab_coverage', 1):.1%} of the full model's choices.\n"
    if best := config.recommended:
        yield f"Recommended: exit after layer {best.exit_layer}, at most {best.num_speculative_tokens} draft tokens,"
        yield f"target accuracy {best.target_accuracy:g}. Replayed on held-out text: acceptance length"
        yield f"{best.predicted_acceptance_length}, and {best.predicted_speedup} times plain decoding's speed by"
        yield "the cost model of calibrate. Measure on your machine.\n"
    for exit_config in config.exits:
        yield from _calibration(exit_config)
    for name, caption in PICTURES.items():
        if (folder / name).exists():
            yield f"![{caption}]({name})\n"
    yield "## How they were trained\n"
    for key in ("note", "trained", "records", "scored_tokens", "seconds", "options", "calibrated_on", "versions"):
        if key in provenance:
            yield f"- {key.replace('_', ' ')}: {_words(provenance[key])}"
    yield f"- base model fingerprint: {config.fingerprint}\n"


def _row(heads: Heads, exit_config: ExitHeadConfig) -> str:
    calibration = _of(exit_config)
    weights = sum(p.numel() for p in heads.modules[exit_config.exit_layer].parameters()) / 1e6
    agreed = ", ".join(f"{position.agreement:.1%}" for position in calibration.positions)
    cost = "" if calibration.draft_cost is None else f"{calibration.draft_cost:.0%}"
    return f"| {exit_config.exit_layer} | {exit_config.kind} | {weights:.1f} | {cost} | {agreed} |"


def _calibration(exit_config: ExitHeadConfig) -> Iterator[str]:
    calibration = _of(exit_config)
    yield f"## Calibration of the exit after layer {exit_config.exit_layer}\n"
    yield "| target accuracy | entropy at most, nats | share of tokens | accuracy on documents that were not fitted |"
    yield "| --- | --- | --- | --- |"
    for t in calibration.thresholds:
        measured = "" if t.measured is None else f"{t.measured:.1%}"
        yield f"| {t.accuracy:g} | {t.entropy:.3f} | {t.coverage:.0%} | {measured} |"
    errors = ", ".join(f"{position.expected_calibration_error:.3f}" for position in calibration.positions)
    yield f"\nExpected calibration error per draft position, on documents that were not fitted: {errors}.\n"
    if calibration.signals:
        yield "| measure of uncertainty | area under the risk-coverage curve | 95 % interval |"
        yield "| --- | --- | --- |"
        for signal in calibration.signals:
            yield f"| {signal.name} | {signal.risk_coverage_area:.4f} | {signal.low:.4f} to {signal.high:.4f} |"
        yield f"\nLess is better: {calibration.signals[0].name} is best here. Serving uses entropy.\n"


def _of(exit_config: ExitHeadConfig) -> Calibration:
    assert exit_config.calibration is not None
    return exit_config.calibration


def _tokens(exit_config: ExitHeadConfig) -> int:
    return _of(exit_config).tokens


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
