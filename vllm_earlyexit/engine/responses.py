"""What responses say of early exits: which layers a request's tokens needed.

Workers attach to a step's output which tokens have left; the scheduler keeps them with the request, and they go into
the one field of vLLM's responses that takes what an engine adds, ``kv_transfer_params``.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_earlyexit.config import EarlyExitConfig
from vllm_earlyexit.engine.early_exit import wish_of

LEFT = "self_exit_left"
KEY = "self_exit"


def attach(output: Any, name: str, told: Mapping[str, Any]) -> None:
    """Attach to a step's output, vLLM's ``ModelRunnerOutput`` or a promise of it, what a worker tells the scheduler.

    Args:
        output: The step's.
        name: ``LEFT`` for the exit layer of each new token that has left, by its number in the step, or
            ``ahead.SURPLUS``.
        told: That, by request id; nothing is attached if it is empty.
    """
    if told:
        setattr(getattr(output, "model_runner_output", output), name, told)


def keep(scheduler: Any, output: Any) -> None:
    """Keep with its request what has left in a step; called before vLLM's scheduler adds the step's tokens."""
    for request_id, left in getattr(output, LEFT, {}).items():
        if request := scheduler.requests.get(request_id):
            at = request.num_output_tokens
            request.__dict__.setdefault(LEFT, {}).update({at + number: layer for number, layer in left.items()})


def report(scheduler: Any, request: Any, others: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``kv_transfer_params`` of a finished request: ``others``, and if it could exit early, its exits."""
    params, vllm_config = request.sampling_params, scheduler.vllm_config
    config = EarlyExitConfig.of(vllm_config)
    if params is None or not wish_of(params.extra_args, config).early:
        return others
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    exits = exits_of(request.__dict__.get(LEFT, {}), request.num_output_tokens, num_layers)
    return {**(others or {}), KEY: exits}


def exits_of(left: Mapping[int, int], num_tokens: int, num_layers: int) -> dict[str, Any]:
    """Return the mean exit depth of a request's tokens in layers, and how many tokens each exit has given.

    Args:
        left: Exit layer of every token that has left, by its number; those past the end were cut off by a stop.
        num_tokens: Of the output.
        num_layers: Of the model; tokens that have not left count as leaving there.
    """
    layers = [left.get(number, num_layers) for number in range(num_tokens)]
    counts = {str(layer): count for layer, count in sorted(Counter(layers).items())}
    return {"mean_exit_depth": round(sum(layers) / max(1, num_tokens), 2), "tokens_per_exit": counts}
