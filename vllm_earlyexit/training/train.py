"""Train exit heads by distillation from the recorded full model, which stays frozen (self-supervised)."""

import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.heads.checkpoint import ExitHeadConfig, Heads, HeadsConfig, LossName, Storage, load_heads
from vllm_earlyexit.heads.fingerprint import fingerprint, model_folder
from vllm_earlyexit.heads.modules import ATTENDING, HeadKind, build_head
from vllm_earlyexit.training.classroom import MEASURED_STEPS, Classroom, Students, agreement, frequent_tokens
from vllm_earlyexit.training.losses import LOSSES, Target, feature_distance
from vllm_earlyexit.training.narrow import narrowed
from vllm_earlyexit.training.packs import Packs, Records, on_device
from vllm_earlyexit.training.plots import learning_curve
from vllm_earlyexit.training.shards import Batch, RecordsConfig, concatenate
from vllm_earlyexit.training.teacher import Teacher, Trained

CHECKPOINTS = ".training"
LEARNING_RATE = 0.5
"""Over the hidden size; wider heads want smaller steps. 2e-3, fine at width 576, undoes a good start at width 896."""
GOING_ON = 0.25
"""Share of that for heads that were trained before; at half of it, heads of width 896 first lost what they had."""
START_TOKENS = 60_000
MEASURED_TOKENS = 12_000


@dataclass(frozen=True)
class TrainingOptions:
    """Knobs of one training run; the defaults train SmolLM2-135M's heads.

    Attributes:
        kinds: Kinds of head; all of them are trained at every exit, from the same batches.
        intermediate_size: Width of the MLPs of ``mlp``, ``tail`` and ``recurrent``.
        draft_vocab_size: Most frequent tokens can be drafted, then those that heads to start from draft; 0 for all.
        loss: Name of the loss.
        feature_weight: Weight of the distance to the full model's features beside it.
        top_k: Use so many of the recorded target probabilities; None for all.
        epochs: Passes over the records.
        max_tokens: Stop after about so many scored tokens.
        batch_tokens: Tokens of a step, prompts included.
        learning_rate: At its peak; it falls along a cosine. None for ``LEARNING_RATE`` / the model's hidden size,
            or ``GOING_ON`` of that with ``start_from``.
        warmup: Share of the steps until then.
        evaluations: How often held-out agreement is measured.
        patience: Stop after so many measurements without improvement.
        held_out: Share of the documents that is never trained on.
        deep_keys: Whether heads see the full model's keys and values of verified tokens (off for ablation only).
        start_from: Folder of heads of the same model to start from, at the same exits or at others that were recorded,
            of the same ``intermediate_size`` or a larger one.
        draft_positions: Positions in a draft that are trained, batch by batch in turn, the first one most, because
            every draft passes it. The mean of their held-out agreement decides what is best.
        storage: How weights are stored.
        deterministic: Use only deterministic algorithms.
        seed: Of everything random.
    """

    kinds: tuple[HeadKind, ...] = ("recurrent",)
    intermediate_size: int = 1536
    draft_vocab_size: int = 16384
    loss: LossName = "kl"
    feature_weight: float = 1.0
    top_k: int | None = None
    epochs: int = 1
    max_tokens: int | None = None
    batch_tokens: int = 512
    learning_rate: float | None = None
    warmup: float = 0.1
    evaluations: int = 8
    patience: int = 3
    held_out: float = 0.03
    deep_keys: bool = True
    start_from: str | None = None
    draft_positions: tuple[int, ...] = (1, 2, 1, 3, 1, 4)
    storage: Storage = "bfloat16"
    deterministic: bool = False
    seed: int = 0


def train_heads(
    model: str,
    records: Sequence[Path],
    out: Path,
    exit_layers: Sequence[int] = (),
    options: TrainingOptions = TrainingOptions(),
    *,
    device: str = "cpu",
    console: Console | None = None,
) -> dict[HeadKind, Heads]:
    """Train one head of every kind at every exit on ``records`` and write the checkpoint to ``out``.

    With several kinds, each kind's checkpoint goes to a folder of its name in ``out``. An interrupted run goes on when
    it is started again with the same options. A checkpoint appears only when training is complete.

    Args:
        model: Folder or Hub id of the base model.
        records: Records folders of the same model.
        out: Folder of the checkpoint.
        exit_layers: Layers to exit after, by default all that were recorded.
        options: Training knobs.
        device: Where to train.
        console: Where progress is reported.

    Raises:
        EarlyExitError: the records do not fit the model or the options, or training diverged.
    """
    console = console or Console()
    folder = model_folder(model)
    opened = Records(records, lambda message: console.print(message, soft_wrap=True))
    layers = _check(opened.config, fingerprint(folder), model, exit_layers, options)
    read = (*layers, opened.config.num_layers - 1)
    train = opened.packs(options.batch_tokens, read, options.held_out, False)
    held_out = opened.packs(options.batch_tokens, read, options.held_out, True)
    if not len(train) or not len(held_out):
        raise EarlyExitError(
            f"{', '.join(map(str, records))}: too few documents to train on some and hold out others; collect more"
        )
    teacher = Teacher(folder, device)
    rate = LEARNING_RATE / teacher.hidden_size * (1 if options.start_from is None else GOING_ON)
    options = replace(options, learning_rate=options.learning_rate or rate)
    known = _known_heads(opened.config, options)
    draft_vocab = frequent_tokens(
        opened.choices(options.held_out, False),
        options.draft_vocab_size,
        opened.config.vocab_size,
        known=None if known is None else known.draft_vocab,
    )
    classroom = Classroom.of(teacher, draft_vocab, options.deep_keys)
    torch.manual_seed(options.seed)
    students = _start(classroom, layers, opened, known, options).to(device)
    console.print(_statement(teacher, students, train, options), soft_wrap=True)
    measured = held_out.limited(MEASURED_TOKENS)
    fitted = _fit(classroom, students, train, measured, out, options, training_identity(opened, layers, options))
    final = agreement(classroom, students, held_out)
    covered = _coverage(classroom, opened, options)
    provenance = {
        "trained": date.today().isoformat(),
        "records": {"folders": [path.name for path in records], "tokens": opened.tokens, "top_k": opened.config.top_k},
        "scored_tokens": fitted.tokens,
        "seconds": fitted.curve[-1]["seconds"],
        "options": asdict(options),
        "draft_vocab_coverage": covered,
        "curve": fitted.curve,
        "versions": {package: version(package) for package in ("vllm-earlyexit", "torch", "transformers")},
    }
    written: dict[HeadKind, Heads] = {}
    for kind in options.kinds:
        target = out if len(options.kinds) == 1 else out / kind
        agreed = {str(layer): final[Students.key(kind, layer)] for layer in layers}
        written[kind] = _checkpoint(classroom, students, kind, layers, opened.config, options)
        written[kind].config.provenance.update(provenance | {"held_out_agreement": agreed})
        written[kind].save(target, options.storage)
    learning_curve(fitted.curve, out / "learning-curve.png")
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return written


def _check(
    config: RecordsConfig, found: str, model: str, exit_layers: Sequence[int], options: TrainingOptions
) -> tuple[int, ...]:
    if config.fingerprint != found:
        raise EarlyExitError(
            f"these records are of {config.base_model!r}, not of {model!r}; collect records of it first"
        )
    layers = tuple(sorted(set(exit_layers))) or config.exit_layers
    missing = [layer for layer in layers if layer not in config.exit_layers]
    if missing:
        kept = ", ".join(map(str, config.exit_layers))
        raise EarlyExitError(f"the records have no hidden states after layer {missing[0]}; they have {kept}")
    if options.top_k is not None and not 0 < options.top_k <= config.top_k:
        raise EarlyExitError(f"the records keep {config.top_k} target probabilities a token, not {options.top_k}")
    for position in options.draft_positions:
        if not 1 <= position <= MEASURED_STEPS:
            raise EarlyExitError(f"draft positions that can be trained are 1 to {MEASURED_STEPS}, not {position}")
    return layers


def _start(
    classroom: Classroom, layers: Sequence[int], records: Records, known: Heads | None, options: TrainingOptions
) -> Students:
    """Return heads that start close to the model, or to ``known`` ones; see ``Teacher.start``.

    The last layer's MLP, where heads start as it, is made as narrow as they are.
    """
    teacher, students = classroom.teacher, Students()
    read = tuple(sorted({*layers, *(known.modules if known else ()), teacher.num_layers - 1}))
    packs = records.packs(options.batch_tokens, read, options.held_out, False)
    first: list[Batch] = []
    while len(first) < len(packs) and sum(len(batch.ids) for batch in first) < START_TOKENS:
        first.append(packs[len(first)])
    sample, width = concatenate(first), options.intermediate_size
    if known is not None:
        modules = {layer: narrowed(teacher, head, layer, sample, width) for layer, head in known.modules.items()}
        known = Heads(known.config, modules, known.draft_vocab)
    for kind in options.kinds:
        for layer in layers:
            like = None if known is None else _nearest(known, kind, layer)
            copies = like is None and kind in ATTENDING
            begun = max(width, teacher.intermediate_size) if copies else width
            head = build_head(kind, teacher.hidden_size, begun, teacher.query_size)
            teacher.start(head, layer, sample, like)
            students[Students.key(kind, layer)] = narrowed(teacher, head, layer, sample, width)
    return students


def _known_heads(config: RecordsConfig, options: TrainingOptions) -> Heads | None:
    """Return the heads to start from.

    Raises:
        EarlyExitError: they are another model's, of another kind, narrower, or at an exit that was not recorded.
    """
    if options.start_from is None:
        return None
    known = load_heads(Path(options.start_from))
    if known.config.fingerprint != config.fingerprint:
        raise EarlyExitError(
            f"the heads in {options.start_from} are of {known.config.base_model!r}, not of {config.base_model!r}"
        )
    for exit_config in known.config.exits:
        if exit_config.kind not in options.kinds or 0 < exit_config.intermediate_size < options.intermediate_size:
            raise EarlyExitError(
                f"the heads in {options.start_from} are of kind {exit_config.kind}, width "
                f"{exit_config.intermediate_size}; train this kind, at most as wide, to start from them"
            )
    if missing := set(known.modules) - set(config.exit_layers):
        raise EarlyExitError(
            f"the records have no hidden states after layer {min(missing)}, where the heads in {options.start_from} sit"
        )
    return known


def _nearest(known: Heads, kind: HeadKind, exit_layer: int) -> Trained | None:
    """Return the known head of ``kind`` whose exit is nearest."""
    same = [e.exit_layer for e in known.config.exits if e.kind == kind]
    at = min(same, key=lambda layer: abs(layer - exit_layer), default=None)
    return None if at is None else Trained(known.modules[at], at)


def _statement(teacher: Teacher, students: Students, train: Packs, options: TrainingOptions) -> str:
    """Say before training what it will take; see ``memory_needed``."""
    scored = sum(train.scored_tokens())
    parameters = sum(p.numel() for p in students.parameters())
    return (
        f"training {', '.join(students)}: {parameters / 1e6:.1f} M parameters on {scored / 1e6:.2f} M tokens, "
        f"needs up to {memory_needed(teacher, students, options) / 1e9:.1f} GB of memory"
    )


def memory_needed(teacher: Teacher, students: Students, options: TrainingOptions) -> int:
    """Return an upper estimate of the bytes that training takes, without what PyTorch itself needs (about 1 GB).

    The base model; weights, gradients and two Adam moments of the heads, twice while a checkpoint is written, and their
    weights at the start; the logits of a batch over the draft vocabulary in bfloat16 and float32, forward and backward,
    one head at a time; and attention's weights and their gradients, for a batch that is a single window.
    """
    base = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    heads = sum(p.numel() for p in students.parameters())
    drafted = min(options.draft_vocab_size or teacher.vocab_size, teacher.vocab_size)
    logits = options.batch_tokens * drafted * (2 + 4 + 4 + 4 + 2)
    activations = options.batch_tokens * (20 * teacher.hidden_size + 8 * options.intermediate_size) * 4
    attention = options.batch_tokens**2 * teacher.num_heads * 24
    return 1_000_000_000 + base + heads * 28 + len(students) * (logits + activations + attention)


def training_identity(records: Records, layers: Sequence[int], options: TrainingOptions) -> dict[str, Any]:
    """What has to be the same for an interrupted run to go on."""
    known = {"records": records.config.model_dump(), "content": records.content, "layers": layers}
    return json.loads(json.dumps(known | {"options": asdict(options)}))


def _coverage(classroom: Classroom, records: Records, options: TrainingOptions) -> float:
    """Return the share of held-out first choices that can be drafted."""
    index = classroom.index.cpu()
    inside = [(index[chosen] >= 0).float() for chosen in records.choices(options.held_out, True)]
    return round(torch.cat(inside).mean().item(), 4)


def _checkpoint(
    classroom: Classroom,
    students: Students,
    kind: HeadKind,
    layers: Sequence[int],
    config: RecordsConfig,
    options: TrainingOptions,
) -> Heads:
    draft_vocab = classroom.draft_vocab
    attends = kind in ATTENDING
    return Heads(
        HeadsConfig(
            base_model=config.base_model,
            fingerprint=config.fingerprint,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.vocab_size if draft_vocab is None else len(draft_vocab),
            exits=tuple(
                ExitHeadConfig(
                    exit_layer=layer,
                    kind=kind,
                    intermediate_size=options.intermediate_size if attends or kind == "mlp" else 0,
                    query_size=classroom.teacher.query_size if attends else 0,
                )
                for layer in layers
            ),
        ),
        {layer: students[Students.key(kind, layer)] for layer in layers},
        draft_vocab,
    )


@dataclass(frozen=True)
class Fitted:
    """What a training run did.

    Attributes:
        tokens: Scored tokens trained on.
        curve: Held-out agreement along the way, a list of ``{"tokens": …, "seconds": …, "agreement": {head: [per draft
            position]}}``; seconds include measuring and what was spent before an interruption.
    """

    tokens: int
    curve: list[dict[str, Any]]


def _fit(
    classroom: Classroom,
    students: Students,
    train: Packs,
    measured: Packs,
    out: Path,
    options: TrainingOptions,
    identity: dict[str, Any],
) -> Fitted:
    """Train ``students`` in place with transformers' Trainer, keeping its checkpoints in ``out`` meanwhile.

    What is best when it is measured stays, be it what they were at the start.
    """
    first = agreement(classroom, students, measured)
    if not any(p.requires_grad for p in students.parameters()):
        return Fitted(0, [{"tokens": 0, "seconds": 0, "agreement": first}])
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    assert options.learning_rate is not None
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    sizes = train.scored_tokens()
    steps = math.ceil(options.epochs * len(train))
    if options.max_tokens is not None:
        steps = min(steps, math.ceil(options.max_tokens / (sum(sizes) / len(sizes))))
    every = max(1, steps // options.evaluations)
    tokens_per_step = sum(sizes) / len(sizes)
    loss_of = LOSSES[options.loss]
    draft_steps = [position - 1 for position in options.draft_positions]

    start = {name: weights.clone() for name, weights in students.state_dict().items()}

    def mean(values: list[float]) -> float:
        return statistics.mean(values[step] for step in draft_steps)

    class Distillation(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            batch = on_device(inputs["batch"], classroom.teacher.device)
            step = draft_steps[self.state.global_step % len(draft_steps)]
            target = Target(batch.top_ids[:, : options.top_k], batch.top_p[:, : options.top_k], classroom.index)
            # The Trainer's own autocast wraps a model's forward, which these heads do not have.
            with classroom.teacher.autocast():
                losses = []
                for _name, layer, module in students.at():
                    features = classroom.features(module, batch.hidden[layer], batch, step)
                    losses.append(loss_of(classroom.logits(features, batch), target))
                    if options.feature_weight:
                        losses.append(options.feature_weight * feature_distance(features, batch.final))
            loss = torch.stack(losses).sum()
            if not torch.isfinite(loss):
                raise EarlyExitError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}: training diverged or a record is "
                    "damaged; nothing was written, try a smaller --learning-rate"
                )
            return loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            result = agreement(classroom, students, measured)
            spent = round(time.monotonic() - started)
            curve.append(
                {"tokens": round(self.state.global_step * tokens_per_step), "seconds": spent, "agreement": result}
            )
            metrics = {f"eval_{name}": mean(values) for name, values in result.items()}
            metrics["eval_agreement"] = sum(metrics.values()) / len(metrics)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            (out / CHECKPOINTS / "curve.json").write_text(json.dumps(curve))
            return metrics

    folder = out / CHECKPOINTS
    last = _resumable(folder, identity, get_last_checkpoint)
    curve: list[dict[str, Any]] = [{"tokens": 0, "seconds": 0, "agreement": first}]
    if last is not None:
        done = json.loads((Path(last) / "trainer_state.json").read_text())["global_step"]
        saved = json.loads((folder / "curve.json").read_text())
        curve = [point for point in saved if point["tokens"] <= round(done * tokens_per_step)]
    started = time.monotonic() - curve[-1]["seconds"]
    trainer = Distillation(
        model=students,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=options.learning_rate,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            warmup_steps=max(1, round(options.warmup * steps)),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            use_cpu=classroom.teacher.device == "cpu",
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="agreement",
            greater_is_better=True,
            logging_steps=max(1, every // 4),
            seed=options.seed,
            full_determinism=options.deterministic,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=measured,
        data_collator=lambda batches: {"batch": batches[0]},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=options.patience)],
    )
    trainer.train(resume_from_checkpoint=last)
    if max(curve, key=lambda point: statistics.mean(map(mean, point["agreement"].values()))) is curve[0]:
        students.load_state_dict(start)
    return Fitted(round(trainer.state.global_step * tokens_per_step), curve)


def _resumable(folder: Path, identity: dict[str, Any], get_last_checkpoint: Any) -> str | None:
    """Return the newest whole checkpoint of an interrupted run with the same options, or None to start anew.

    Raises:
        EarlyExitError: there is an interrupted run with other options.
    """
    known = folder / "identity.json"
    if known.exists() and json.loads(known.read_text()) != identity:
        raise EarlyExitError(
            f"{folder} holds an interrupted run with other options or records; delete it, or run with the same options"
        )
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(identity))
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").exists():  # the Trainer writes it last
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(folder))
