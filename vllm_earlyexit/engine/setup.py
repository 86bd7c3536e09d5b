"""From a request for self-exit to vLLM's configuration; runs before anything is loaded."""

import os
from typing import Any

from vllm_earlyexit.config import CONFIG_KEY, AdditionalConfig, Knobs, resolve
from vllm_earlyexit.engine import models, seams
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.plugin import ACTIVE_VARIABLE, version_problem


def _refuse_unsupported(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    problem = version_problem()
    if problem:
        raise EarlyExitError(f"self-exit: {problem}")
    if parallel_config.tensor_parallel_size > 1 or parallel_config.pipeline_parallel_size > 1:
        raise EarlyExitError("self-exit: tensor and pipeline parallelism are not supported yet; serve with one rank")
    if parallel_config.decode_context_parallel_size > 1 or parallel_config.prefill_context_parallel_size > 1:
        raise EarlyExitError("self-exit: context parallelism is not supported; turn it off")
    if engine_args.enable_lora:
        raise EarlyExitError("self-exit: LoRA adapters are not supported yet; drop --enable-lora")
    if model_config.runner_type != "generate":
        raise EarlyExitError(f"self-exit: it drafts text, so runner {model_config.runner_type!r} has no use for it")


def set_up(engine_args: Any, knobs: Knobs, model_config: Any, parallel_config: Any) -> Any:
    """Check the request, apply the engine seams, and return vLLM's ``SpeculativeConfig`` for it.

    The resolved setting travels to vLLM's processes in ``additional_config``; an environment variable tells the
    plugin in those processes to apply the engine seams.

    Raises:
        EarlyExitError: the request cannot be served as asked.
    """
    _refuse_unsupported(engine_args, model_config, parallel_config)
    architecture = models.PREFIX + models.plain_architecture(model_config.architectures)
    config = resolve(knobs, model_config.model, model_config.revision)

    os.environ[ACTIVE_VARIABLE] = "1"
    seams.apply("engine")
    model_config.hf_config.architectures = [architecture]
    model_config._architecture = architecture
    others = engine_args.additional_config or {}
    engine_args.additional_config = AdditionalConfig({**others, CONFIG_KEY: config.to_dict()})

    from vllm.config import SpeculativeConfig

    return SpeculativeConfig(
        method="custom_class",
        model=seams.PROPOSER,
        num_speculative_tokens=config.num_speculative_tokens,
        target_model_config=model_config,
        target_parallel_config=parallel_config,
    )
