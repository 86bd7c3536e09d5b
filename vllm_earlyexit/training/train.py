"""Train exit heads by distillation from the full model, which stays frozen (self-supervised)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import ExitHeadConfig, Heads, HeadsConfig
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder
from vllm_earlyexit.heads.modules import HeadKind, TailHead, build_head
from vllm_earlyexit.training.data import Window, batches, split, windows
from vllm_earlyexit.training.teacher import Teacher

PENDING_DEPTHS = 4
"""Tail heads are trained and calibrated with 0 to 3 pending tokens before each token, batch by batch in turn."""


@dataclass(frozen=True)
class TrainingOptions:
    """Knobs of one training run; the defaults train SmolLM2-135M's heads."""

    kind: HeadKind = "tail"
    intermediate_size: int = 1536
    draft_vocab_size: int = 16384
    epochs: int = 1
    batch_tokens: int = 2048
    window: int = 512
    learning_rate: float = 1e-3
    warmup: float = 0.03
    held_out: float = 0.03
    seed: int = 0


def frequent_tokens(items: list[Window], size: int, vocab_size: int) -> torch.Tensor | None:
    """Return the ``size`` most frequent scored token ids, ascending, filled up with the lowest unseen ids.

    Returns None, for the full vocabulary, if ``size`` is 0 or at least ``vocab_size``.
    """
    if size <= 0 or size >= vocab_size:
        return None
    counts = Counter(token for w in items for token, scored in zip(w.ids, w.scored, strict=True) if scored)
    chosen = [token for token, _ in counts.most_common(size)]
    unseen = (token for token in range(vocab_size) if token not in counts)
    chosen += [token for token, _ in zip(unseen, range(size - len(chosen)), strict=False)]
    return torch.tensor(sorted(chosen))


@dataclass(frozen=True)
class Target:
    """What the teacher says, on the draft vocabulary.

    Attributes:
        p: Probabilities renormalised on the draft vocabulary, [num_tokens, draft_vocab_size].
        mass: The teacher's probability of the draft vocabulary as a whole, [num_tokens].
        entropy: Of ``p``, in nats, [num_tokens].
    """

    p: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor


def draft_target(teacher: torch.Tensor, draft_vocab: torch.Tensor | None) -> Target:
    """Return the distillation target for the teacher's logits, [num_tokens, vocab_size]."""
    kept = (teacher if draft_vocab is None else teacher[:, draft_vocab]).float()
    log_kept = kept.logsumexp(dim=-1)
    mass = torch.ones_like(log_kept) if draft_vocab is None else (log_kept - teacher.float().logsumexp(dim=-1)).exp()
    p = (kept - log_kept.unsqueeze(-1)).exp_()
    return Target(p, mass, log_kept - (p * kept).sum(dim=-1))


def distillation_loss(student: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the mean KL(teacher || student) over tokens, in nats.

    Every token weighs as much as the teacher's mass on the draft vocabulary, so that tokens which cannot be drafted
    do not pull on the head.

    Args:
        student: Logits over the draft vocabulary, [num_tokens, draft_vocab_size].
        target: The teacher's side.
    """
    student = student.float()
    cross_entropy = student.logsumexp(dim=-1) - (target.p * student).sum(dim=-1)
    return ((cross_entropy - target.entropy) * target.mass).mean()


def _check(exit_layers: Sequence[int], teacher: Teacher) -> list[int]:
    layers = sorted(set(exit_layers))
    if not layers or layers[0] < 1 or layers[-1] >= teacher.num_layers:
        raise EarlyExitError(
            f"exit layers must lie between 1 and {teacher.num_layers - 1} for this model, got {list(exit_layers)}"
        )
    return layers


def train_heads(
    model: str,
    data: Sequence[Path],
    out: Path,
    exit_layers: Sequence[int],
    options: TrainingOptions = TrainingOptions(),
    *,
    name: str | None = None,
    device: str = "cpu",
    max_tokens: int | None = None,
) -> Heads:
    """Train one head per exit layer on ``data`` and write the checkpoint to ``out``.

    Args:
        model: Folder or Hub id of the base model.
        data: Files of text records.
        out: Folder of the checkpoint.
        exit_layers: Layers to exit after.
        options: Training knobs.
        name: Name of the base model to record, by default ``model``'s last path component.
        device: Where to train.
        max_tokens: Stop after about so many scored tokens.

    Raises:
        EarlyExitError: the model or the exit layers cannot be used.
    """
    torch.manual_seed(options.seed)
    folder = model_folder(model)
    teacher = Teacher(folder, torch.bfloat16, device)
    layers = _check(exit_layers, teacher)
    train, held_out = split(windows(data, teacher.tokenizer, options.window), options.held_out, options.seed)
    if not train:
        raise EarlyExitError(f"no text to train on in {', '.join(map(str, data))}")
    draft_vocab = frequent_tokens(train, options.draft_vocab_size, teacher.vocab_size)
    modules = {layer: _start_head(teacher, options).to(device) for layer in layers}
    parameters = [p for module in modules.values() for p in module.parameters()]
    steps = [b for epoch in range(options.epochs) for b in batches(train, options.batch_tokens, options.seed + epoch)]
    if max_tokens is not None:
        steps = _until(steps, max_tokens)
    trained = sum(sum(w.scored) for step in steps for w in step)
    if parameters:
        _fit(teacher, modules, draft_vocab, steps, options)
    heads = Heads(
        HeadsConfig(
            base_model=name or Path(model).name,
            fingerprint=fingerprint(folder),
            hidden_size=teacher.hidden_size,
            num_layers=teacher.num_layers,
            vocab_size=teacher.vocab_size,
            draft_vocab_size=teacher.vocab_size if draft_vocab is None else len(draft_vocab),
            exits=tuple(
                ExitHeadConfig(
                    exit_layer=layer,
                    kind=options.kind,
                    intermediate_size=options.intermediate_size if options.kind in ("mlp", "tail") else 0,
                    query_size=teacher.query_size if options.kind == "tail" else 0,
                )
                for layer in layers
            ),
            provenance={
                "trained": date.today().isoformat(),
                "scored_tokens": trained,
                "data": [path.name for path in data],
                "options": asdict(options),
                "held_out_agreement": agreement(teacher, modules, draft_vocab, held_out, options.batch_tokens),
                "versions": {package: version(package) for package in ("vllm-earlyexit", "torch", "transformers")},
            },
        ),
        modules,
        draft_vocab,
    )
    heads.save(out)
    return heads


def _start_head(teacher: Teacher, options: TrainingOptions) -> torch.nn.Module:
    head = build_head(options.kind, teacher.hidden_size, options.intermediate_size, teacher.query_size)
    if isinstance(head, TailHead):
        teacher.start_as_last_layer(head)
    return head


def _until(steps: list[list[Window]], max_tokens: int) -> list[list[Window]]:
    total = 0
    for n, step in enumerate(steps):
        total += sum(sum(w.scored) for w in step)
        if total >= max_tokens:
            return steps[: n + 1]
    return steps


def _fit(
    teacher: Teacher,
    modules: dict[int, torch.nn.Module],
    draft_vocab: torch.Tensor | None,
    steps: list[list[Window]],
    options: TrainingOptions,
) -> None:
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    warm = max(1, int(options.warmup * len(steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * n / len(steps)))),
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    smooth = dict.fromkeys(modules, math.nan)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(steps), losses="")
        for n, step in enumerate(steps):
            seen = teacher.observe(step, list(modules), pending=n % PENDING_DEPTHS)
            target = draft_target(seen.logits, draft_vocab)
            loss = torch.zeros((), device=teacher.device)
            for layer, module in modules.items():
                with torch.autocast(teacher.device, torch.bfloat16):
                    logits = teacher.unembed(seen.features(layer, module), draft_vocab)
                part = distillation_loss(logits, target)
                loss = loss + part
                value = part.item()
                smooth[layer] = value if math.isnan(smooth[layer]) else 0.95 * smooth[layer] + 0.05 * value
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses = "KL " + ", ".join(f"layer {layer}: {value:.3f}" for layer, value in smooth.items())
            progress.update(bar, advance=1, losses=losses)
            if not progress.console.is_terminal and n % 50 == 49:
                progress.console.print(f"step {n + 1} of {len(steps)}: {losses}")


@torch.no_grad()
def agreement(
    teacher: Teacher,
    modules: dict[int, torch.nn.Module],
    draft_vocab: torch.Tensor | None,
    held_out: list[Window],
    batch_tokens: int,
) -> dict[str, float]:
    """Return for each exit layer the share of held-out tokens on which head and full model choose alike."""
    hits, tokens = dict.fromkeys(modules, 0), 0
    for n, step in enumerate(batches(held_out, batch_tokens, 0)):
        seen = teacher.observe(step, list(modules), pending=n % PENDING_DEPTHS)
        target = seen.logits.argmax(dim=-1)
        tokens += len(target)
        for layer, module in modules.items():
            choice = teacher.unembed(seen.features(layer, module), draft_vocab).argmax(dim=-1)
            choice = choice if draft_vocab is None else draft_vocab[choice]
            hits[layer] += int((choice == target).sum())
    return {str(layer): round(hits[layer] / tokens, 4) for layer in modules}
