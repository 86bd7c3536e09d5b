"""Which measure of uncertainty tells right from wrong drafts best?"""

import numpy as np
import torch

from vllm_earlyexit.heads.checkpoint import Signal, SignalName
from vllm_earlyexit.training.traces import Trace

SAMPLES = 200


def risk_coverage_area(confidence: np.ndarray, agrees: np.ndarray) -> float:
    """Return the area under the risk-coverage curve: the mean error rate of the surest n tokens over all n.

    Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """
    order = np.argsort(-confidence, kind="stable")
    return float((np.cumsum(~agrees[order]) / np.arange(1, len(order) + 1)).mean())


def compare(trace: Trace, half: np.ndarray) -> tuple[Signal, ...]:
    """Return every measure's area with a bootstrap interval over documents, the best one first.

    Args:
        trace: The first draft position, with features.
        half: Which half of the documents a token belongs to, bool [num_tokens]; the probe is trained on the other.
    """
    agrees, top = trace.agrees.numpy(), trace.top.numpy()
    confidences: dict[SignalName, np.ndarray] = {
        "entropy": -trace.entropy.numpy(),
        "max_probability": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "probe": probe(trace, half),
    }
    starts = np.cumsum([0, *trace.lengths])
    stretches: dict[int, list[np.ndarray]] = {}
    for key, start, end in zip(trace.documents, starts, starts[1:], strict=False):
        stretches.setdefault(key, []).append(np.arange(start, end))
    documents = [np.concatenate(parts) for parts in stretches.values()]
    draw = np.random.default_rng(0)
    samples = [
        np.concatenate([documents[n] for n in draw.integers(len(documents), size=len(documents))])
        for _ in range(SAMPLES)
    ]
    found = []
    for name, confidence in confidences.items():
        areas = [risk_coverage_area(confidence[sample], agrees[sample]) for sample in samples]
        low, high = np.quantile(areas, [0.025, 0.975])
        area = risk_coverage_area(confidence, agrees)
        found.append(
            Signal(name=name, risk_coverage_area=round(area, 4), low=round(float(low), 4), high=round(float(high), 4))
        )
    return tuple(sorted(found, key=lambda signal: signal.risk_coverage_area))


def probe(trace: Trace, half: np.ndarray) -> np.ndarray:
    """Return the probability of agreement by a logistic regression on features and uncertainty, [num_tokens].

    Each half of the documents is judged by the regression that was fitted on the other half.
    """
    torch.manual_seed(0)
    uncertainty = torch.stack([trace.entropy, *trace.top.clamp(min=1e-6).log().unbind(1)], dim=1)
    design = torch.cat([trace.features.float(), uncertainty], dim=1)
    design = (design - design.mean(dim=0)) / design.std(dim=0).clamp(min=1e-6)
    side = torch.from_numpy(half)
    judged = torch.empty(len(design))
    for judged_side in (side, ~side):
        judged[judged_side] = _logistic(design[~judged_side], trace.agrees[~judged_side].float())(design[judged_side])
    return judged.numpy()


def _logistic(design: torch.Tensor, agrees: torch.Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(design.shape[1], 1)
    model = torch.nn.Sequential(linear, torch.nn.Flatten(0))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(model(design), agrees)
        value = value + 1e-3 * linear.weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return torch.nn.Sequential(model, torch.nn.Sigmoid()).requires_grad_(False)
