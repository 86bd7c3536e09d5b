"""From a request for self-exit to vLLM's configuration; runs before anything is loaded."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_earlyexit.config import CONFIG_KEY, AdditionalConfig, EarlyExitConfig, Knobs, knobs_from, resolve
from vllm_earlyexit.engine import counters, seams
from vllm_earlyexit.engine.early_exit import wish_of
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.plugin import ACTIVE_VARIABLE, METHOD, version_problem

REFUSED: dict[str, Callable[[Any, Any], bool]] = {
    "pipeline parallelism is not supported; use tensor parallelism": lambda model, parallel: (
        parallel.pipeline_parallel_size > 1
    ),
    "context parallelism is not supported; turn it off": lambda model, parallel: (
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
    ),
    "it drafts text, so runners that do not generate have no use for it": lambda model, parallel: (
        model.runner_type != "generate"
    ),
}
"""What cannot be served, from vLLM's model and parallel configuration; docs/compatibility.md says the same."""


def _refuse_unsupported(model_config: Any, parallel_config: Any) -> None:
    problem = version_problem()
    if problem:
        raise EarlyExitError(f"self-exit: {problem}")
    for sentence, applies in REFUSED.items():
        if applies(model_config, parallel_config):
            raise EarlyExitError(f"self-exit: {sentence}")


def admit(request: Any, vllm_config: Any) -> None:
    """Check what a request asks for, and keep approximate KV from requests that did not ask for it.

    Args:
        request: vLLM's ``EngineCoreRequest``; gets a ``cache_salt`` of its own kind if its KV is propagated.
        vllm_config: vLLM's.

    Raises:
        VLLMValidationError: it asks for what the server does not do, so that clients get vLLM's answer to bad requests.
    """
    from vllm.exceptions import VLLMValidationError

    if request.sampling_params is None:
        return
    config = EarlyExitConfig.of(vllm_config)
    try:
        wish = wish_of(request.sampling_params.extra_args, config)
    except EarlyExitError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from None
    if wish.early and config.fill_in == "propagate":
        request.cache_salt = f"{request.cache_salt or ''} self-exit: propagated KV"


def requested(engine_args: Any, model_config: Any, parallel_config: Any) -> Any:
    """Return vLLM's ``SpeculativeConfig`` if its arguments ask for self-exit, None if they ask for something else.

    Raises:
        EarlyExitError: self-exit is asked for in a way that cannot be served.
    """
    given = (engine_args.spec_method, engine_args.spec_model, engine_args.spec_tokens)
    knobs = knobs_from(engine_args.speculative_config, *given)
    return None if knobs is None else set_up(engine_args, knobs, model_config, parallel_config)


def set_up(engine_args: Any, knobs: Knobs, model_config: Any, parallel_config: Any) -> Any:
    """Check the request, apply the engine seams, and return vLLM's ``SpeculativeConfig`` for it.

    The resolved setting travels to vLLM's processes in ``additional_config``; an environment variable tells the
    plugin in those processes to apply the engine seams.

    Raises:
        EarlyExitError: the request cannot be served as asked.
    """
    from vllm_earlyexit.engine import models

    _refuse_unsupported(model_config, parallel_config)
    architecture = models.PREFIX + models.plain_architecture(model_config.architectures)
    config = resolve(knobs, model_config.model, model_config.revision, engine_args.download_dir)
    config = replace(config, counters=counters.folder())

    if config.exits_early:  # responses say what has left, which is known when the next step's drafts are
        engine_args.async_scheduling = False

    os.environ[ACTIVE_VARIABLE] = "1"
    seams.apply("engine")
    model_config.hf_config.architectures = [architecture]
    model_config._architecture = architecture
    others = engine_args.additional_config or {}
    engine_args.additional_config = AdditionalConfig({**others, CONFIG_KEY: config.to_dict()})

    from vllm.config import SpeculativeConfig

    ours: dict[str, Any] = {"method": "custom_class", "model": seams.PROPOSER}
    if seams.built_in():
        ours = {"method": METHOD, "model": METHOD}
    return SpeculativeConfig(
        **ours,
        num_speculative_tokens=config.num_speculative_tokens,
        target_model_config=model_config,
        target_parallel_config=parallel_config,
    )
