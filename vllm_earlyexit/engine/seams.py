"""Every change to vLLM, in one list. ``vllm-earlyexit doctor`` prints and checks it.

Two *doors* are in place whenever the plugin is loaded: they recognise a request for self-exit and hand everything
else through untouched. *Engine* seams are applied only in processes that serve self-exit. One *scoped* seam is held
for the length of a segment's forward pass.
"""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from vllm_earlyexit.plugin import ACTIVE_VARIABLE, METHOD

logger = logging.getLogger("vllm.earlyexit")

PROPOSER = "vllm_earlyexit.engine.runner_v1.SelfExitProposer"

PROCESS_INPUTS = (
    "self",
    "request_id",
    "prompt",
    "params",
    "supported_tasks",
    "arrival_time",
    "lora_request",
    "tokenization_kwargs",
    "trace_headers",
    "priority",
    "data_parallel_rank",
    "resumable",
    "session_id",
    "kv_hints",
)

Stage = Literal["door", "engine", "scoped"]


@dataclass(frozen=True)
class Seam:
    """One change to vLLM.

    Attributes:
        target: ``module:attribute.path`` of what is changed.
        stage: When it is applied.
        why: What it is for.
        how: What it does.
        upstream: What would make it unnecessary.
        expects: The target's parameter names, or its kind, as in the vLLM that this was written for.
        wrap: Makes the replacement from the original; None for a scoped seam.
    """

    target: str
    stage: Stage
    why: str
    how: str
    upstream: str
    expects: tuple[str, ...]
    wrap: Callable[[Any], Any] | None = None

    def holder(self) -> tuple[Any, str]:
        """Return the object that holds the target and the target's name in it."""
        module, _, path = self.target.partition(":")
        owner: Any = import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name

    def original(self) -> Any:
        """Return vLLM's own object, also while the seam is applied."""
        if self.target in _originals:
            return _originals[self.target]
        owner, name = self.holder()
        return inspect.getattr_static(owner, name)

    def problem(self) -> str | None:
        """Return a sentence if the target does not look as expected, None if it does."""
        try:
            found = shape(self.original())
        except (ImportError, AttributeError) as error:
            return f"{self.target} is gone ({error}); this vLLM differs from the one that is supported"
        if found != self.expects:
            return f"{self.target} has changed: expected {', '.join(self.expects)}; found {', '.join(found)}"
        return None


def shape(target: Any) -> tuple[str, ...]:
    """Return what a seam relies on: a function's parameter names, otherwise the object's kind."""
    if isinstance(target, property):
        return ("property",)
    if isinstance(target, staticmethod | classmethod):
        target = target.__func__
    if inspect.isroutine(target) or inspect.isclass(target):
        return tuple(inspect.signature(target).parameters)
    return ("variable",)


_originals: dict[str, Any] = {}


def built_in() -> bool:
    """Return whether this vLLM was built with the patch that makes seams unnecessary."""
    from vllm.config.speculative import SpeculativeMethod

    return METHOD in get_args(SpeculativeMethod)


def applied(stage: Stage | None = None) -> list[str]:
    """Return the targets that are changed in this process, of one stage or of all."""
    return [seam.target for seam in SEAMS if seam.target in _originals and stage in (None, seam.stage)]


def apply(stage: Stage) -> None:
    """Apply every seam of ``stage`` that is not yet applied in this process; none if vLLM has them built in.

    Raises:
        RuntimeError: a target does not look as expected, or did not take the change.
    """
    for seam in () if built_in() else SEAMS:
        if seam.stage != stage or seam.wrap is None or seam.target in _originals:
            continue
        problem = seam.problem()
        if problem:
            if stage == "door":  # vLLM must start without us; asking for self-exit will then fail in vLLM's own words
                logger.warning("vllm-earlyexit is inactive: %s", problem)
                return
            raise RuntimeError(f"self-exit: {problem}; run 'vllm-earlyexit doctor'")
        owner, name = seam.holder()
        original = seam.original()
        replacement = seam.wrap(original)
        setattr(owner, name, replacement)
        if inspect.getattr_static(owner, name) is not replacement:
            raise RuntimeError(f"self-exit: {seam.target} could not be changed; run 'vllm-earlyexit doctor'")
        _originals[seam.target] = original
    if stage == "engine":
        _register_architectures()


def remove(stage: Stage) -> None:
    """Undo the seams of one stage in this process (for tests)."""
    for seam in SEAMS:
        if seam.stage == stage and seam.target in _originals:
            owner, name = seam.holder()
            setattr(owner, name, _originals.pop(seam.target))
    if stage == "engine":
        os.environ.pop(ACTIVE_VARIABLE, None)


def _register_architectures() -> None:
    from vllm import ModelRegistry

    from vllm_earlyexit.engine import models

    for base in models.BASES:
        name = models.PREFIX + base
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{models.__name__}:{name}")


def uses_self_exit(speculative_config: Any) -> bool:
    """Return whether a vLLM ``SpeculativeConfig`` (or None) is ours."""
    return speculative_config is not None and (
        speculative_config.method == METHOD or speculative_config.model == PROPOSER
    )


def _open_request_door(original: Callable) -> Callable:
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        from vllm_earlyexit.engine.setup import requested

        ours = requested(self, target_model_config, target_parallel_config)
        return ours or original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _open_flag_door(original: staticmethod) -> staticmethod:
    def add_cli_args(parser: Any) -> Any:
        parser = original.__func__(parser)
        parser.add_argument(
            "--speculative-model",
            dest="spec_model",
            type=str,
            help="The same as --spec-model. '[self-exit]' or '[self-exit]:HEADS' turns on self-exit speculation "
            "(vllm-earlyexit); HEADS is a folder or a Hub id of trained exit heads.",
        )
        return parser

    return staticmethod(add_cli_args)


def _reserve_lookahead(original: property) -> property:
    def num_lookahead_tokens(self: Any) -> int:
        if uses_self_exit(self.speculative_config):
            return self.speculative_config.num_speculative_tokens
        assert original.fget is not None
        return original.fget(self)

    return property(num_lookahead_tokens, doc=original.__doc__)


def _draft_with_runner(original: Callable) -> Callable:
    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        *args: Any,
    ) -> Any:
        if not uses_self_exit(self.speculative_config):
            return original(
                self,
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                *args,
            )
        self._draft_probs = self._draft_prob_req_ids = None
        drafted = None if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        longest = scheduler_output.num_spec_tokens_to_schedule
        return self.drafter.propose(self, sampled_token_ids, sample_hidden_states, drafted, longest)

    return propose_draft_token_ids


def _always_fits(original: Callable) -> Callable:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        if uses_self_exit(self.speculative_config):
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return _input_fits_in_drafter


def _resume_in_runner(original: Callable) -> Callable:
    def _model_forward(
        self: Any,
        input_ids: Any = None,
        positions: Any = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if uses_self_exit(self.speculative_config):
            resumed = self.drafter.forward(self, input_ids, positions)
            if resumed is not None:
                return resumed
        return original(self, input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs)

    return _model_forward


def _measure_when_warm(original: Callable) -> Callable:
    def compile_or_warm_up_model(self: Any) -> None:
        original(self)
        if uses_self_exit(self.speculative_config):
            from vllm_earlyexit.engine.rounds import measure

            self.collective_rpc(measure)

    return compile_or_warm_up_model


def _verify_as_plain(original: Callable) -> Callable:
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or not uses_self_exit(self.speculative_config):
            return original(self, logits, spec_decode_metadata)
        return self.drafter.sample(self, logits, spec_decode_metadata)

    return _sample


def _process_logits_as_plain(original: Callable) -> Callable:
    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_self_exit(vllm_config.speculative_config):
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = None
        return original(vllm_config, *args, **kwargs)

    return build_logitsprocs


def _ask_for_early_exits(original: Callable) -> Callable:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if uses_self_exit(self.vllm_config.speculative_config):
            from vllm_earlyexit.engine.setup import admit

            admit(request, self.vllm_config)
        return request

    return process_inputs


def _tell_of_exits(original: Callable) -> Callable:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        if output is not None and uses_self_exit(self.speculative_config):
            from vllm_earlyexit.engine.rounds import adapter_of

            adapter_of(self).tell(output)
        return output

    return sample_tokens


def _tell_of_exits_on_v2(original: Callable) -> Callable:
    tell = _tell_of_exits(original)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if uses_self_exit(self.speculative_config):
            grammar_output = self.speculator.masks(grammar_output)
        return tell(self, grammar_output)

    return sample_tokens


def _keep_exits(original: Callable) -> Callable:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        if uses_self_exit(self.vllm_config.speculative_config):
            from vllm_earlyexit.engine.ahead import discount
            from vllm_earlyexit.engine.responses import keep

            keep(self, model_runner_output)
            discount(scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def _count_what_was_drafted(original: Callable) -> Callable:
    def make_spec_decoding_stats(
        self: Any,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: Any,
        request_id: str,
    ) -> Any:
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        if num_draft_tokens == invalid and uses_self_exit(self.vllm_config.speculative_config):
            return spec_decoding_stats
        counts = num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens
        return original(self, spec_decoding_stats, *counts, request_id)

    return make_spec_decoding_stats


def _schedule_ahead_on_v2(original: Any) -> Any:
    return Literal[original, "custom_class"]


def _wait_for_drafts_on_v1(original: Callable) -> Callable:
    def _validate_v1_model_runner(self: Any) -> None:
        if uses_self_exit(self.speculative_config):
            self.scheduler_config.async_scheduling = False
        original(self)

    return _validate_v1_model_runner


def _leave_room_for_prompts(original: Callable) -> Callable:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if uses_self_exit(self.vllm_config.speculative_config):
            from vllm_earlyexit.engine.ahead import room

            config = self.scheduler_config
            self.dynamic_sd_lookup = room(self.num_spec_tokens, self.max_num_scheduled_tokens, config.max_num_seqs)

    return __init__


def _report_exits(original: Callable) -> Callable:
    def _free_request(self: Any, request: Any, delay_free_blocks: bool = False) -> Any:
        params, others = original(self, request, delay_free_blocks)
        if uses_self_exit(self.vllm_config.speculative_config):
            from vllm_earlyexit.engine.responses import report

            params = report(self, request, params)
        return params, others

    return _free_request


def _admit_as_plain(original: Callable) -> Callable:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not uses_self_exit(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def _let_v2_serve(original: Callable) -> Callable:
    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        if not uses_self_exit(self.speculative_config):
            return original(self)
        others = [one for one in original(self) if one != "speculative method 'custom_class'"]
        return others + (["self-exit with LoRA adapters"] if self.lora_config is not None else [])

    return _get_v2_model_runner_unsupported_features


def _speculate_on_v2(original: Callable) -> Callable:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not uses_self_exit(vllm_config.speculative_config):
            return original(vllm_config, device, req_states)
        from vllm_earlyexit.engine.runner_v2 import SelfExitSpeculator

        return SelfExitSpeculator(vllm_config)

    return init_speculator


def _plain_steps_in_graphs_on_v2(original: Callable) -> Callable:
    def ModelCudaGraphManager(
        vllm_config: Any, device: Any, cudagraph_mode: Any, decode_query_len: int, *args: Any, **kwargs: Any
    ) -> Any:
        if uses_self_exit(vllm_config.speculative_config):
            decode_query_len = 1
        return original(vllm_config, device, cudagraph_mode, decode_query_len, *args, **kwargs)

    return ModelCudaGraphManager


def _attach_on_v2(original: Callable) -> Callable:
    def load_model(self: Any, load_dummy_weights: bool = False, *args: Any, model: Any = None, **kwargs: Any) -> None:
        original(self, load_dummy_weights, *args, model=model, **kwargs)
        if uses_self_exit(self.speculative_config):
            self.speculator.attach(self)

    return load_model


def _cut_down_on_v2(original: Callable) -> Callable:
    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if uses_self_exit(self.speculative_config) and not dummy_run:
            scheduler_output = self.speculator.cut_down(scheduler_output)
        return original(self, scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)

    return execute_model


def _tell_of_batch_on_v2(original: Callable) -> Callable:
    def prepare_inputs(
        self: Any, scheduler_output: Any, batch_req_state: Any, batch_desc: Any, num_active_loras: Any
    ) -> Any:
        batch = original(self, scheduler_output, batch_req_state, batch_desc, num_active_loras)
        if uses_self_exit(self.speculative_config):
            self.speculator.scheduled(scheduler_output, batch)
        return batch

    return prepare_inputs


@contextmanager
def pipeline_stage(first: bool, last: bool) -> Iterator[None]:
    """Let vLLM's pipeline group answer as the first and/or last rank while a segment runs.

    vLLM's models ask the group whether to embed tokens and whether to apply the final norm.
    """
    parallel_state: Any = import_module("vllm.distributed.parallel_state")
    if built_in():
        with parallel_state.override_pp_stage(first, last):
            yield
        return
    group = parallel_state._PP
    assert group is not None
    stage = copy.copy(group)
    stage.ranks = [*([] if first else [-1]), group.rank, *([] if last else [-2])]
    parallel_state._PP = stage
    try:
        yield
    finally:
        parallel_state._PP = group


SEAMS = (
    Seam(
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        stage="door",
        why="SpeculativeConfig.method is a closed list, so method='self_exit' has to be translated before it is built.",
        how="Requests for self-exit become method='custom_class' with our proposer; all others are handed through.",
        upstream="An open registry of speculative methods would replace it.",
        expects=("self", "target_model_config", "target_parallel_config"),
        wrap=_open_request_door,
    ),
    Seam(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        stage="door",
        why="vLLM 0.32 has --spec-model but no --speculative-model.",
        how="Adds --speculative-model as another name of --spec-model.",
        upstream="Not needed by anyone who writes --spec-model '[self-exit]'.",
        expects=("parser",),
        wrap=_open_flag_door,
    ),
    Seam(
        target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        stage="engine",
        why="Drafting writes KV below the cut past the scheduled tokens; the scheduler must have reserved the slots.",
        how="Answers num_speculative_tokens for self-exit, vLLM's own answer otherwise.",
        upstream="A lookahead attribute that a custom_class proposer can set would replace it.",
        expects=("property",),
        wrap=_reserve_lookahead,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
        stage="engine",
        why="A custom_class proposer gets token lists only; drafting needs block tables and attention groups.",
        how="Hands the runner itself to our proposer.",
        upstream="custom_class passing what the built-in drafters get would replace it.",
        expects=(
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
        wrap=_draft_with_runner,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter",
        stage="engine",
        why="Near max_model_len vLLM replaces every request's draft by zeros, which are then verified in vain.",
        how="Always lets our proposer draft; it keeps each request's draft within max_model_len by itself.",
        upstream="A per-request limit in the runner would replace it.",
        expects=("self", "common_attn_metadata"),
        wrap=_always_fits,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        stage="engine",
        why="Verification resumes pending tokens at the cut, where drafting left them.",
        how="Lets our proposer run the batch if it holds pending tokens of it; otherwise vLLM's own forward.",
        upstream="vLLM documents this method as one to override; a hook for proposers would replace the seam.",
        expects=("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds", "model_kwargs"),
        wrap=_resume_in_runner,
    ),
    Seam(
        target="vllm.v1.executor.abstract:Executor.compile_or_warm_up_model",
        stage="engine",
        why="The cost model needs the times of a step's parts on the machine that serves, before the first request.",
        how="Afterwards lets each worker's proposer run them over vLLM's null block.",
        upstream="A warm-up hook for custom_class proposers would replace it.",
        expects=("self",),
        wrap=_measure_when_warm,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        stage="engine",
        why="vLLM's rejection sampler leaves out min-p, logit bias and custom logits processors, draws other random "
        "numbers than plain decoding does for the same seed, copies the logits of greedy requests three times, and on "
        "CPUs samples from a wrong distribution (vLLM issue 55005).",
        how="Samples token after token with vLLM's own sampler until one differs from the draft; where every request "
        "is greedy and nothing else is asked of its logits, finds the largest of them in place.",
        upstream="A rejection sampler for drafts without probabilities that does the same would replace it.",
        expects=("self", "logits", "spec_decode_metadata"),
        wrap=_verify_as_plain,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        stage="engine",
        why="vLLM drops the processors of min-p and logit bias, and refuses custom ones, if it speculates.",
        how="Builds those of plain decoding for self-exit.",
        upstream="As for _sample.",
        expects=("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
        wrap=_process_logits_as_plain,
    ),
    Seam(
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        stage="engine",
        why="vLLM refuses requests with min-p or logit bias if it speculates.",
        how="Admits them for self-exit.",
        upstream="As for _sample.",
        expects=("self", "speculative_config"),
        wrap=_admit_as_plain,
    ),
    Seam(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        stage="engine",
        why="Requests may ask for early exits, which not every server allows, and approximate KV must not be shared.",
        how="Checks what a request asks for; where KV is propagated, gives it a cache_salt.",
        upstream="A hook for validators of extra_args would replace it.",
        expects=PROCESS_INPUTS,
        wrap=_ask_for_early_exits,
    ),
    Seam(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        stage="engine",
        why="Responses say which exits a request's tokens have left at; only workers know.",
        how="Attaches it to the step's output.",
        upstream="A field of ModelRunnerOutput for what a proposer reports of requests would replace this and the next "
        "three.",
        expects=("self", "grammar_output"),
        wrap=_tell_of_exits,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        stage="engine",
        why="See above, for V2. With async scheduling, grammars have masks for drafts that were not drafted.",
        how="See above; takes these masks away.",
        upstream="See above.",
        expects=("self", "grammar_output"),
        wrap=_tell_of_exits_on_v2,
    ),
    Seam(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        stage="engine",
        why="See above.",
        how="Keeps what workers attached with the requests; room for drafts that nobody needed is not counted.",
        upstream="See above.",
        expects=("self", "scheduler_output", "model_runner_output"),
        wrap=_keep_exits,
    ),
    Seam(
        target="vllm.v1.core.sched.scheduler:Scheduler._free_request",
        stage="engine",
        why="See above.",
        how="Adds the exits of a finished request to kv_transfer_params, a field of vLLM's responses that is a dict.",
        upstream="See above.",
        expects=("self", "request", "delay_free_blocks"),
        wrap=_report_exits,
    ),
    Seam(
        target="vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        stage="engine",
        why="Model Runner V2 has no proposers of a custom class, so vLLM would use V1, which it has deprecated.",
        how="Leaves them out of the list for self-exit without LoRA adapters; other reasons to fall back stay.",
        upstream="A registry of V2 speculators would replace this one and the next four.",
        expects=("self",),
        wrap=_let_v2_serve,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        stage="engine",
        why="V2 knows its speculators by name.",
        how="Makes our speculator for self-exit.",
        upstream="See above.",
        expects=("vllm_config", "device", "req_states"),
        wrap=_speculate_on_v2,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:ModelCudaGraphManager",
        stage="engine",
        why="With drafts, V2 captures graphs of whole decode steps for requests that all have drafts of full length. "
        "Those could not be resumed, and steps without drafts would have none.",
        how="Captures those of plain decoding, one token a request.",
        upstream="A speculator that says which lengths are uniform would replace it.",
        expects=(
            "vllm_config",
            "device",
            "cudagraph_mode",
            "decode_query_len",
            "lora_capture_cases",
            "varlen_decode",
            "ubatch_runner",
        ),
        wrap=_plain_steps_in_graphs_on_v2,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
        stage="engine",
        why="Our speculator drafts with the target's layers, block tables and attention groups.",
        how="Hands it the runner once the model is loaded.",
        upstream="V2 does the same for speculators with a draft model.",
        expects=("self", "load_dummy_weights", "args", "model", "kwargs"),
        wrap=_attach_on_v2,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs",
        stage="engine",
        why="To resume pending tokens, a forward pass must know which request each of its tokens belongs to.",
        how="Tells our speculator of the batch before it is run.",
        upstream="A hook for speculators would replace it.",
        expects=("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
        wrap=_tell_of_batch_on_v2,
    ),
    Seam(
        target="vllm.config.vllm:EagleModelTypes",
        stage="engine",
        why="vLLM turns async scheduling off for all speculative methods but those of a list.",
        how="Adds self-exit to the list.",
        upstream="A registry of V2 speculators would replace this one and the next four.",
        expects=("variable",),
        wrap=_schedule_ahead_on_v2,
    ),
    Seam(
        target="vllm.config.vllm:VllmConfig._validate_v1_model_runner",
        stage="engine",
        why="See above; on V1 the scheduler has to wait for drafts.",
        how="Turns async scheduling off there.",
        upstream="See above.",
        expects=("self",),
        wrap=_wait_for_drafts_on_v1,
    ),
    Seam(
        target="vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__",
        stage="engine",
        why="The scheduler leaves room for every request's longest draft, for many requests more than a step holds.",
        how="Leaves less the more requests there are, so that half of a step's tokens stay free for prompts.",
        upstream="See above.",
        expects=("self", "args", "kwargs"),
        wrap=_leave_room_for_prompts,
    ),
    Seam(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
        stage="engine",
        why="See above; what was drafted is shorter than the room for it, and layers would run over all of it.",
        how="Drafts, cuts the step down to what was drafted, then runs it.",
        upstream="See above; vLLM's adaptive verification does the same for its method dspark.",
        expects=(
            "self",
            "scheduler_output",
            "intermediate_tensors",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "is_profile",
            "context_len",
            "valid_dummy_state_slots",
            "randomize_inputs",
        ),
        wrap=_cut_down_on_v2,
    ),
    Seam(
        target="vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
        stage="engine",
        why="See above; vLLM would count a draft in every step.",
        how="Does not count drafts of no tokens.",
        upstream="See above.",
        expects=(
            "self",
            "spec_decoding_stats",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_invalid_spec_tokens",
            "request_id",
        ),
        wrap=_count_what_was_drafted,
    ),
    Seam(
        target="vllm.distributed.parallel_state:_PP",
        stage="scoped",
        why="Models ask the pipeline group whether they hold the first or last layers; a segment needs its own answer.",
        how="Swapped for a copy with other ranks while a segment's forward runs, then put back.",
        upstream="Models taking first/last as arguments would replace it.",
        expects=("variable",),
    ),
)
