"""Early exits: who asks for them gets them, everybody else gets plain decoding; KV is what it should be."""

import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import adapter_of, engine, runner_of
from tests.engine.heads import LADDER
from tests.engine.reference import MAX_TOKENS, Reference
from tests.engine.test_kv import BLOCK, NOISE, PROMPTS, Snapshots
from vllm_earlyexit.engine.drafter import Pending, SelfExitDrafter
from vllm_earlyexit.engine.early_exit import ACCURACY, MODE, THRESHOLD

OPEN = {
    "method": "self_exit",
    "policy": "entropy",
    "exit_layer": 2,
    "num_speculative_tokens": 6,
    "lowest_accuracy": 0.6,
}
PROPAGATING = OPEN | {"fill_in": "propagate", "check_rate": 0.0}
LOW, SHORT = {ACCURACY: 0.6}, 40
FULL = pytest.mark.matrix("full")
FILLS = pytest.mark.parametrize("setting", [OPEN, PROPAGATING], ids=["resume", "propagate"])
USUAL = [(OPEN, "entropy"), (PROPAGATING, "auto")]
OTHERS = [(OPEN, "auto"), (OPEN, "fixed"), (PROPAGATING, "entropy"), (PROPAGATING, "fixed")]


def ask(llm: Any, prompts: Sequence[str], extra: Sequence[dict[str, Any] | None], **params: Any) -> list[list[int]]:
    """Ask all prompts at once, each in its own way; return the tokens of each answer."""
    return [list(output.outputs[0].token_ids) for output in responses(llm, prompts, extra, **params)]


def responses(llm: Any, prompts: Sequence[str], extra: Sequence[dict[str, Any] | None], **params: Any) -> list[Any]:
    """Ask all prompts at once; return vLLM's ``RequestOutput`` of each."""
    from vllm import SamplingParams

    params = {"temperature": 0, "max_tokens": MAX_TOKENS} | params
    messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    each = [SamplingParams(**params, extra_args=asked) for asked in extra]
    return llm.chat(messages, each, use_tqdm=False)


def exits(outputs: Sequence[Any]) -> list[dict[str, Any] | None]:
    """Return what each response says of its early exits, None if nothing."""
    return [(output.kv_transfer_params or {}).get("self_exit") for output in outputs]


def log_probabilities_are_the_full_models(llm: Any, plain: Reference) -> None:
    """Whoever asks for them gets plain decoding, and nobody is disturbed by a request that was refused."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=1, extra_args=LOW)
    messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in plain.prompts[:8]]
    outputs = [o.outputs[0] for o in llm.chat(messages, params, use_tqdm=False)]
    plain.check([list(output.token_ids) for output in outputs], 8)
    assert counts(llm)["early_tokens"] == 0


def counts(llm: Any) -> Any:
    return adapter_of(llm).drafter.early.counts


def test_a_threshold_that_nothing_meets_changes_nothing(smollm2: Path, plain: Reference):
    from vllm.exceptions import VLLMValidationError

    with engine(smollm2, speculative_config=OPEN) as llm:
        plain.check(ask(llm, plain.prompts[:8], [{THRESHOLD: -1.0}] * 8), 8)
        assert counts(llm)["early_tokens"] == 0
        assert counts(llm)["full_depth_tokens"] > 300
        for extra, words in (({ACCURACY: 0.3}, "at least 0.6 here"), ({"early_exit_speed": 3}, "'early_exit_speed'")):
            with pytest.raises(VLLMValidationError, match=words):
                ask(llm, plain.prompts[:1], [extra])
        log_probabilities_are_the_full_models(llm, plain)


@pytest.mark.parametrize(("setting", "policy"), [*USUAL, *(pytest.param(*other, marks=FULL) for other in OTHERS)])
def test_neighbours_of_early_exits_decode_as_plain(
    smollm2: Path, plain: Reference, ladder: str, setting: dict[str, Any], policy: str
):
    ours = setting | {"policy": policy, "num_speculative_tokens": 6}
    if policy == "auto":
        ours |= {"model": ladder, "exit_layer": LADDER}
    with engine(smollm2, speculative_config=ours) as llm:
        if policy == "auto":
            from tests.engine.test_lossless import draft_from_each_exit_in_turn

            draft_from_each_exit_in_turn(adapter_of(llm).drafter.policy)
        asked = [None, LOW, {MODE: "off"}, LOW, {MODE: "lossless"}, LOW, None, LOW]
        lossless, early, same = [], [], 0
        for start in range(0, 24, 8):
            answers = ask(llm, plain.prompts[start : start + 8], asked)
            lossless += [answers[n] if n % 2 == 0 else plain.answers[8][start + n] for n in range(8)]
            early += [answers[n] for n in range(1, 8, 2)]
            same += sum(answers[n] == plain.answers[8][start + n] for n in range(1, 8, 2))
        plain.check(lossless, 8)
        assert counts(llm)["early_tokens"] > 100
        assert same < len(early), "nothing that left was wrong, so nothing was shown"


@pytest.mark.parametrize("chunk", [pytest.param(2048, marks=FULL), 40])
def test_kv_that_is_resumed_is_that_of_a_whole_forward(smollm2: Path, prompts: list[str], chunk: int):
    from vllm import SamplingParams

    arguments = {"enable_prefix_caching": False, "max_num_batched_tokens": chunk, "block_size": BLOCK}
    with engine(smollm2, speculative_config=OPEN, **arguments) as llm:
        watch = Snapshots(runner_of(llm))
        messages: list[Any] = [[{"role": "user", "content": p}] for p in prompts[:PROMPTS]]
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, extra_args=LOW)
        outputs = llm.chat(messages, params, use_tqdm=False)
        assert counts(llm)["early_tokens"] > 50
        assert counts(llm)["agreed_tokens"] < counts(llm)["checked_tokens"]
        answered = dict(watch.kept)
        watch.kept.clear()
        whole: list[Any] = [{"prompt_token_ids": [*o.prompt_token_ids, *o.outputs[0].token_ids]} for o in outputs]
        llm.generate(whole, SamplingParams(max_tokens=1, extra_args={MODE: "off"}), use_tqdm=False)
        compared = 0
        for tokens, blocks in answered.items():
            if tokens:
                reference = next(kept for known, kept in watch.kept.items() if known[: len(tokens)] == tokens)
                assert (blocks - reference[:, : blocks.shape[1]]).abs().max() < NOISE
                compared += 1
        assert compared >= 2 * PROMPTS


class Written:
    """Everything that is written into the KV cache, by layer and slot, and which tokens skipped layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        self.kv: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
        self.skipped: set[int] = set()
        update = CPUAttentionBackendImpl.do_kv_cache_update

        def watched(
            own: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
        ) -> None:
            places = slots.tolist()[: len(key)]
            each = zip(places, key.clone(), value.clone(), strict=True)
            self.kv[layer.layer_name] |= {place: (k, v) for place, k, v in each}
            update(own, layer, key, value, kv_cache, slots)

        monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", watched)
        verify = SelfExitDrafter._verify_others

        @functools.wraps(verify)
        def verify_others(drafter: Any, ids: Any, positions: torch.Tensor, pending: Pending, context: Any) -> Any:
            self.skipped |= {int(positions[n]) for n in pending.skipping}
            return verify(drafter, ids, positions, pending, context)

        monkeypatch.setattr(SelfExitDrafter, "_verify_others", verify_others)


def slow_reference(folder: Path, tokens: list[int], skipped: set[int], cut: int) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values of every layer, each [num_tokens, kv_heads, head_size], by transformers' modules.

    Above the cut, skipped tokens' keys and values come from their hidden states at the cut.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    ids = torch.tensor([tokens])
    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden, torch.arange(len(tokens))[None])
    away = torch.tensor([n in skipped for n in range(len(tokens))])[None, :, None]
    found, at_cut = [], hidden
    for number, layer in enumerate(model.layers):
        at_cut = hidden if number == cut else at_cut
        seen = torch.where(away, at_cut, hidden) if number >= cut else hidden
        normed, own = layer.input_layernorm(seen), layer.self_attn

        def split(x: torch.Tensor, n: int) -> torch.Tensor:
            return x.view(1, len(tokens), n, -1).transpose(1, 2)

        query, key = split(own.q_proj(normed), heads), split(own.k_proj(normed), kv_heads)
        value = split(own.v_proj(normed), kv_heads)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        found.append((key[0].transpose(0, 1), value[0].transpose(0, 1)))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + own.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return found


@torch.inference_mode()
def test_kv_that_is_propagated_is_that_of_a_slow_reference(
    smollm2: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
):
    with engine(smollm2, speculative_config=PROPAGATING, enable_prefix_caching=False, block_size=BLOCK) as llm:
        runner = runner_of(llm)
        written = Written(monkeypatch)
        tables: list[list[int]] = []
        propose = runner.drafter.propose

        def watch(*arguments: Any) -> Any:
            tables.append(runner.input_batch.block_table[0].get_device_tensor(1)[0].tolist())
            return propose(*arguments)

        runner.drafter.propose = watch
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, extra_args=LOW)
        (output,) = llm.chat([{"role": "user", "content": prompts[0]}], params, use_tqdm=False)
        layers = [layer.self_attn.attn.layer_name for layer in runner.model.model.layers]
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
    skipped = {position for position in written.skipped if position < len(tokens)}
    assert len(skipped) > 15
    expected = slow_reference(smollm2, tokens, skipped, OPEN["exit_layer"])  # type: ignore[arg-type]
    known = len(tokens) - 20  # the last round's tokens may not have been verified
    for name, (keys, values) in zip(layers, expected, strict=True):
        for position in range(known):
            slot = tables[-1][position // BLOCK] * BLOCK + position % BLOCK
            key, value = written.kv[name][slot]
            assert (key - keys[position]).abs().max() < NOISE * 10, (name, position, position in skipped)
            assert (value - values[position]).abs().max() < NOISE * 10


@FILLS
def test_approximate_kv_is_never_shared(smollm2: Path, prompts: list[str], setting: dict[str, Any]):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=16, extra_args={MODE: "lossless"})
    with engine(smollm2, speculative_config=setting, block_size=BLOCK) as llm:
        early = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, extra_args=LOW)
        (output,) = llm.chat([{"role": "user", "content": prompts[0]}], early, use_tqdm=False)
        again: Any = {"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]}
        (lossless,) = llm.generate(again, greedy, use_tqdm=False)
        (repeated,) = llm.generate(again, greedy, use_tqdm=False)
        assert counts(llm)["early_tokens"] > 20
    with engine(smollm2) as llm:
        (expected,) = llm.generate(again, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    assert lossless.outputs[0].token_ids == repeated.outputs[0].token_ids == expected.outputs[0].token_ids
    assert repeated.num_cached_tokens > len(output.prompt_token_ids)
    if setting is PROPAGATING:
        assert lossless.num_cached_tokens == 0
    else:
        assert lossless.num_cached_tokens > len(output.prompt_token_ids) + BLOCK


@pytest.mark.parametrize("setting", [OPEN, pytest.param(PROPAGATING, marks=FULL)])
def test_sampling_parameters_are_honoured(smollm2: Path, prompts: list[str], setting: dict[str, Any]):
    with engine(smollm2, speculative_config=setting) as llm:
        few = [{THRESHOLD: 100.0}] * 2  # as far as is allowed, and never corrected
        greedy = ask(llm, prompts[:2], few, max_tokens=SHORT)
        before = counts(llm)["early_tokens"]
        assert ask(llm, prompts[:2], few, max_tokens=SHORT, temperature=1.0, top_k=1) == greedy
        assert counts(llm)["early_tokens"] > before + 10
        words = {token: llm.get_tokenizer().decode([token]) for token in said(greedy)}
        whole = [token for token in said(greedy) if words[token][:1] == " " and words[token].strip().isalpha()]
        common = max(whole, key=whole.count)
        for params in ({"allowed_token_ids": [*range(100, 3000)]}, {"temperature": 1.0, "min_p": 0.2, "seed": 3}):
            answers = ask(llm, prompts[:2], few, max_tokens=SHORT, ignore_eos=True, **params)
            allowed = params.get("allowed_token_ids")
            assert all(len(answer) == SHORT for answer in answers)
            assert allowed is None or {token for answer in answers for token in answer} <= set(allowed)
        biased = ask(llm, prompts[:2], few, max_tokens=SHORT, logit_bias={common: -100.0})
        assert common not in said(biased)
        without = ask(llm, prompts[:2], few, max_tokens=SHORT, bad_words=[words[common].strip()], temperature=0.7)
        assert common not in said(without)
        longest = ask(llm, prompts[:2], few, max_tokens=SHORT, min_tokens=SHORT, stop_token_ids=[common])
        assert all(len(answer) == SHORT for answer in longest)
        penalised = ask(
            llm, prompts[:2], few, max_tokens=SHORT, presence_penalty=2.0, frequency_penalty=2.0, ignore_eos=True
        )
        assert distinct(penalised) > distinct(greedy)


def said(answers: list[list[int]]) -> list[int]:
    return [token for answer in answers for token in answer]


def distinct(answers: list[list[int]]) -> float:
    return sum(len(set(answer)) / len(answer) for answer in answers) / len(answers)


def test_structured_outputs_stay_valid(smollm2: Path, prompts: list[str]):
    from vllm.sampling_params import StructuredOutputsParams

    wanted = r"(In|The|This) [a-z ]{20,60}\. [A-Z][a-z ]{20,60}\."
    with engine(smollm2, speculative_config=OPEN) as llm:
        structured = StructuredOutputsParams(regex=wanted)
        answers = ask(llm, prompts[:4], [LOW] * 4, max_tokens=100, structured_outputs=structured)
        texts = [llm.get_tokenizer().decode(answer, skip_special_tokens=True) for answer in answers]
        assert counts(llm)["early_tokens"] > 10
    for text in texts:
        assert re.fullmatch(wanted, text), text


def test_preempted_and_aborted_requests_leave_nothing_behind(smollm2: Path, plain: Reference):
    blocks = {"num_gpu_blocks_override": 24, "block_size": BLOCK, "max_model_len": 512}
    with engine(smollm2, speculative_config=OPEN, enable_prefix_caching=False, **blocks) as llm:
        llm.llm_engine.add_request("gone", prompt := "Tell me a long story.", early_params())
        for _ in range(6):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["gone"])
        asked = [None, LOW] * 4
        answers = ask(llm, plain.prompts[:8], asked)
        plain.check([answers[n] if n % 2 == 0 else plain.answers[8][n] for n in range(8)], 8)
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert preempted > 0
        assert prompt


def early_params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, extra_args=LOW)


def test_what_is_reported_is_what_happened(smollm2: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch):
    """Every early token was one of which its head was sure enough; all others are the full model's choice."""
    from vllm_earlyexit.engine.rounds import SelfExit

    left: list[tuple[float, float]] = []
    with engine(smollm2, speculative_config=OPEN) as llm:
        drafter = adapter_of(llm).drafter
        leave = drafter._leave

        def watched(rows: Any, asked: Any, cut: int, position: int, frontier: Any, leaving: Any) -> Any:
            said, final = leave(rows, asked, cut, position, frontier, leaving)
            for row, unsure, leaves in zip(rows.tolist(), asked.entropy.tolist(), final.tolist(), strict=True):
                if leaves:
                    left.append((unsure, leaving.limits[row].at(cut, position)))
            return said, final

        drafter._leave = watched
        wrong = []
        check = SelfExit.check

        def checked(ours: Any, request: Any, final: Any, draft: Any, choices: Any) -> None:
            wrong.extend(
                n for n, pair in enumerate(zip(draft, choices, strict=True)) if pair[0] != pair[1] and n in final
            )
            check(ours, request, final, draft, choices)

        monkeypatch.setattr(SelfExit, "check", checked)
        outputs = responses(llm, prompts[:8], [LOW] * 8, ignore_eos=True)
        counted = counts(llm)
        drafter._leave = leave
        assert exits(responses(llm, prompts[:2], [None, {MODE: "off"}], max_tokens=4)) == [None, None]
    assert all(unsure <= limit for unsure, limit in left)
    assert len(left) >= counted["early_tokens"] > 100
    tokens = 8 * (MAX_TOKENS - 1)  # the first comes from the prompt's pass
    assert tokens == counted["early_tokens"] + counted["full_depth_tokens"]
    said = exits(outputs)
    assert sum(one["tokens_per_exit"]["2"] for one in said) == counted["early_tokens"]
    for one in said:
        early, full = one["tokens_per_exit"]["2"], one["tokens_per_exit"]["30"]
        assert early + full == MAX_TOKENS
        assert one["mean_exit_depth"] == round((2 * early + 30 * full) / MAX_TOKENS, 2)
    assert counted["early_tokens_2"] == counted["early_tokens"]
    assert counted["checked_tokens"] - counted["agreed_tokens"] <= len(wrong)
