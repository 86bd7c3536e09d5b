"""How good are exit heads on prompts that nothing was fitted on?

    python -m benchmarks.heads MODEL HEADS --records RECORDS --out RESULT.json

RECORDS is a folder of ``vllm-earlyexit collect --sampled 0``: the model's own greedy answers to test prompts.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.results import write_result
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import model_folder
from vllm_earlyexit.training.calibrate import expected_calibration_error, trace_heads


def main(
    model: str,
    heads: Path,
    records: Annotated[list[Path], typer.Option()],
    out: Annotated[Path, typer.Option()],
) -> None:
    """Measure agreement per draft position, and whether thresholds and acceptance maps keep their promise."""
    loaded = load_heads(heads)
    config = loaded.config
    traces, _ = trace_heads(model_folder(model), loaded, records, every_document=True, device="cpu")
    exits = []
    for exit_config in config.exits:
        here, calibration = traces[exit_config.exit_layer], exit_config.calibration
        assert calibration is not None
        first = here[0]
        kept = {t.accuracy: first.entropy <= t.entropy for t in calibration.thresholds}
        errors = []
        for trace, position in zip(here, calibration.positions, strict=True):
            probability = np.interp(trace.entropy.numpy(), position.entropy, position.probability)
            errors.append(expected_calibration_error(probability, trace.agrees.numpy()))
        exits.append(
            {
                "exit_layer": exit_config.exit_layer,
                "kind": exit_config.kind,
                "agreement": [trace.agreement for trace in here],
                "expected_calibration_error": [round(error, 4) for error in errors],
                "measured_accuracy": {
                    f"{accuracy:g}": round(first.agrees[mask].double().mean().item(), 4)
                    for accuracy, mask in kept.items()
                    if mask.any()
                },
                "coverage": {f"{accuracy:g}": round(mask.double().mean().item(), 4) for accuracy, mask in kept.items()},
            }
        )
    documents = len(set(traces[config.exits[0].exit_layer][0].documents))
    tokens = len(traces[config.exits[0].exit_layer][0].agrees)
    write_result(
        out, "heads", {"base_model": config.base_model, "documents": documents, "tokens": tokens, "exits": exits}
    )


if __name__ == "__main__":
    typer.run(main)
