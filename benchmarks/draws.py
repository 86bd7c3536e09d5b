"""How often does what is drafted for a request that samples agree with what the full model samples?

    python -m benchmarks.draws MODEL HEADS --records RECORDS --out RESULT.json

RECORDS is a folder of ``vllm-earlyexit collect --sampled 1``: answers that the model has sampled. Drafts are a head's
first choice; what the head draws with the random numbers with which the model samples; and what no draft can exceed.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.results import write_result
from vllm_earlyexit.heads.checkpoint import load_heads
from vllm_earlyexit.heads.fingerprint import model_folder
from vllm_earlyexit.training.classroom import MEASURED_STEPS, Classroom
from vllm_earlyexit.training.packs import Records
from vllm_earlyexit.training.teacher import Teacher

TEMPERATURES = (0.3, 0.6, 1.0)
ROWS, DRAWS = 64, 4


def rates(full: Tensor, head: Tensor, known: Tensor, noise: Tensor) -> Tensor:
    """Return how often drafts agree, summed over tokens, float64 [3]: first choices, draws, and the limit.

    Args:
        full: The model's logits over temperature, [n, vocab_size].
        head: The head's, [n, draft_vocab_size].
        known: Token ids that the head knows, int64 [draft_vocab_size].
        noise: Standard Gumbel, [draws, n, vocab_size].
    """
    p, q = full.softmax(dim=-1), head.softmax(dim=-1)
    first = p.gather(1, known[head.argmax(dim=-1, keepdim=True)]).sum()
    drawn = (full + noise).argmax(dim=-1) == known[(head + noise[:, :, known]).argmax(dim=-1)]
    limit = torch.minimum(p[:, known], q).sum()
    return torch.stack([first.double(), drawn.double().mean(dim=0).sum(), limit.double()])


@torch.no_grad()
def main(
    model: str,
    heads: Path,
    records: Annotated[list[Path], typer.Option()],
    out: Annotated[Path, typer.Option()],
    tokens: int = 4000,
) -> None:
    """Measure agreement at every draft position and several temperatures."""
    torch.manual_seed(0)
    loaded, opened = load_heads(heads), Records(records)
    layers = tuple(loaded.modules)
    packs = opened.packs(1024, (*layers, opened.config.num_layers - 1), 1.0, True).limited(tokens)
    teacher = Teacher(model_folder(model), "cpu")
    classroom, every = Classroom.of(teacher, loaded.draft_vocab), teacher.rows(None)
    known = torch.arange(teacher.vocab_size) if loaded.draft_vocab is None else loaded.draft_vocab
    sums = torch.zeros(len(layers), MEASURED_STEPS, len(TEMPERATURES), 3, dtype=torch.float64)
    scored = 0
    for n in range(len(packs)):
        batch = packs[n]
        with teacher.autocast():
            full = teacher.unembed(batch.final[batch.scored], every)
            said = [
                [logits for logits, _ in classroom.every_logits(module, batch.hidden[layer], batch, MEASURED_STEPS)]
                for layer, module in loaded.modules.items()
            ]
        scored += len(full)
        for at in torch.arange(len(full)).split(ROWS):
            noise = -torch.empty(DRAWS, len(at), full.shape[1]).exponential_().log()
            for exit_, steps in enumerate(said):
                for step, logits in enumerate(steps):
                    for number, temperature in enumerate(TEMPERATURES):
                        scaled = full[at].float() / temperature, logits[at].float() / temperature
                        sums[exit_, step, number] += rates(*scaled, known, noise)
    exits = [
        {
            "exit_layer": layer,
            "temperatures": {
                f"{temperature:g}": {
                    name: [round(value, 4) for value in (sums[exit_, :, number, kind] / scored).tolist()]
                    for kind, name in enumerate(("first_choice", "drawn", "limit"))
                }
                for number, temperature in enumerate(TEMPERATURES)
            },
        }
        for exit_, layer in enumerate(layers)
    ]
    write_result(out, "draws", {"base_model": loaded.config.base_model, "tokens": scored, "exits": exits})


if __name__ == "__main__":
    typer.run(main)
