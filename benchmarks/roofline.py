"""On paper: what self-exit could gain on one H100, by a roofline, over exit depth, acceptance and batch size.

    python -m benchmarks.roofline --out FOLDER

No measurement goes in. A part of a step takes the larger of the time to read its weights and KV and the time to do
its arithmetic, both at a share of the device's peak, plus the time to launch it. Acceptance is the same at each draft
position.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: What it is.
        bandwidth: Bytes per second from memory, at peak.
        flops: Dense bfloat16 operations per second, at peak.
        reached: Share of either peak that decoding kernels reach.
        launch: Seconds to start a part of a step (a replayed graph and the work around it).
        around: Seconds of a step outside the model: scheduler, sampler, input preparation.
    """

    name: str
    bandwidth: float
    flops: float
    reached: float
    launch: float
    around: float


@dataclass(frozen=True)
class Shape:
    """A decoder model.

    Attributes:
        name: Of the model.
        layers: Decoder layers.
        hidden: Hidden size.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Of either.
        vocab: Tokens.
        weight_bytes: Bytes of a weight.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    weight_bytes: float = 2

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def head(self, draft_vocab: int) -> int:
        """Weights of a ``recurrent`` head, as wide relative to the model as the shipped ones, and its vocabulary's."""
        mlp = 3 * self.hidden * round(self.hidden * 1536 / 576)
        queries = 3 * self.hidden * self.heads * self.head_size
        return 2 * self.hidden**2 + 2 * mlp + queries + draft_vocab * self.hidden

    def kv_bytes(self, context: int) -> int:
        """Bytes of one layer's KV of a sequence."""
        return 2 * 2 * self.kv_heads * self.head_size * context


H100 = Device("H100 SXM, 80 GB", 3.35e12, 989e12, reached=0.7, launch=30e-6, around=1e-3)
SHAPES = (
    Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("Llama-3-70B, 8-bit weights", 80, 8192, 28672, 64, 8, 128, 128256, weight_bytes=1),
    Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936),
    Shape("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151936),
    Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936),
    Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936),
    Shape("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936),
    Shape("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936),
)
CONTEXT, DRAFT_VOCAB, LONGEST = 1024, 32768, 8


def seconds(device: Device, weights: float, weight_bytes: float, kv_bytes: float, tokens: float) -> float:
    """Return the time of one part over ``tokens`` tokens that read ``kv_bytes`` in all."""
    memory = (weights * weight_bytes + kv_bytes) / (device.bandwidth * device.reached)
    return max(memory, 2 * weights * tokens / (device.flops * device.reached)) + device.launch


def speedup(device: Device, shape: Shape, exit_layer: int, acceptance: float, batch: int, length: int) -> float:
    """Return tokens per second over plain decoding's, when every sequence drafts ``length`` tokens with resume."""

    def part(layers: float, tokens: float, extra: float = 0) -> float:
        kv = shape.kv_bytes(CONTEXT) * layers * batch
        return seconds(device, layers * shape.layer + extra, shape.weight_bytes, kv, tokens)

    lm_head, deep = shape.hidden * shape.vocab, shape.layers - exit_layer
    plain = part(exit_layer, batch) + part(deep, batch, lm_head) + device.around
    if length == 0:
        return 1.0
    head_kv = shape.kv_bytes(CONTEXT) * batch
    head = seconds(device, shape.head(DRAFT_VOCAB), shape.weight_bytes, head_kv, batch)
    feeding = (length + 1) * part(exit_layer, batch)
    drafting = length * head + feeding + part(deep, batch * (length + 1), lm_head) + device.around
    expected = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    return expected * plain / drafting


def best(device: Device, shape: Shape, exit_layer: int, acceptance: float, batch: int) -> tuple[float, int]:
    """Return the highest speed-up over draft lengths from 0, which is plain decoding, and its length."""
    return max((speedup(device, shape, exit_layer, acceptance, batch, n), n) for n in range(LONGEST + 1))


def rows() -> Iterator[dict[str, object]]:
    """Yield one row for each model, exit depth, acceptance and batch size."""
    for shape in SHAPES:
        for depth in (1 / 8, 1 / 4, 1 / 3):
            exit_layer = max(1, round(shape.layers * depth))
            for acceptance in (0.5, 0.6, 0.7, 0.8):
                for batch in (1, 8, 32, 128, 256):
                    gain, length = best(H100, shape, exit_layer, acceptance, batch)
                    yield {
                        "model": shape.name,
                        "exit_layer": exit_layer,
                        "layers": shape.layers,
                        "acceptance": acceptance,
                        "batch": batch,
                        "speedup": round(gain, 2),
                        "draft_length": length,
                    }


def main(out: Annotated[Path, typer.Option(help="Folder of roofline.json and roofline.png.")]) -> None:
    """Predict, print a table for exits at a quarter of the depth, and draw speed-up against batch size."""
    table = list(rows())
    out.mkdir(parents=True, exist_ok=True)
    known = {"device": asdict(H100), "context": CONTEXT, "draft_vocab": DRAFT_VOCAB, "rows": table}
    (out / "roofline.json").write_text(json.dumps(known, indent=1) + "\n")
    printed = Table("model", "exit", "acceptance", *(f"batch {batch}" for batch in (1, 8, 32, 128, 256)))
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for shape in SHAPES:
        quarter = max(1, round(shape.layers / 4))
        for acceptance in (0.6, 0.8):
            here = [
                r for r in table if (r["model"], r["exit_layer"], r["acceptance"]) == (shape.name, quarter, acceptance)
            ]
            printed.add_row(
                shape.name, str(quarter), f"{acceptance}", *(f"{r['speedup']} ({r['draft_length']})" for r in here)
            )
            axes = panels[0 if acceptance == 0.6 else 1]
            axes.plot([r["batch"] for r in here], [r["speedup"] for r in here], marker=".", label=shape.name)
            axes.set(xlabel="batch", title=f"acceptance {acceptance}, exit at a quarter of the depth")
            axes.set_xscale("log", base=2)
    panels[0].set_ylabel("predicted tokens per second / plain")
    panels[0].legend(fontsize=8)
    figure.savefig(out / "roofline.png", dpi=120)
    Console().print(printed)


if __name__ == "__main__":
    typer.run(main)
