"""Which draft tokens are kept: those that plain decoding would have sampled."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from math import gcd
from typing import cast

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

EPSILON = 1e-5
"""Temperatures below are 0, for vLLM too."""
BLOCK, LEAST_BLOCK = 1024, 64
"""Logits of which the largest is found before its place is; with smaller blocks that is not faster."""


def only_largest(sampling: SamplingMetadata) -> bool:
    """Return whether every request wants the token of the largest logit and nothing else."""
    thinking = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.no_penalties
        and not sampling.bad_words_token_ids
        and sampling.allowed_token_ids_mask is None
        and (thinking is None or not thinking.has_tracked_requests())
        and not any(map(_changes_logits, sampling.logitsprocs.non_argmax_invariant))
    )


def is_greedy(params: SamplingParams | None) -> bool:
    """Return whether a request wants its most probable tokens and nothing else, as far as ``may_leave`` lets it."""
    return params is None or (
        params.temperature < EPSILON
        and params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.bad_words_token_ids
        and params.allowed_token_ids is None
        and params.structured_outputs is None
    )


def may_leave(params: SamplingParams | None, outputs: int) -> bool:
    """Return whether a request that has generated so many tokens may sample from an exit head.

    Log-probabilities are the full model's, biases may be for tokens that a head does not know, and heads are not told
    how many tokens there must be at least.
    """
    return params is None or not (params.num_logprobs is not None or params.logit_bias or outputs < params.min_tokens)


def lets_leave(sampling: SamplingMetadata) -> bool:
    """Return whether requests of a batch may sample from exit heads: not beside what keeps books of sampled tokens."""
    thinking = sampling.thinking_budget_state_holder
    known = (MinPLogitsProcessor, MinTokensLogitsProcessor, LogitBiasLogitsProcessor)
    return (thinking is None or not thinking.has_tracked_requests()) and all(
        type(processor) in known for processor in sampling.logitsprocs.all
    )


def _changes_logits(processor: LogitsProcessor) -> bool:
    """Return whether a logits processor may do something; of others than vLLM's own that is not known."""
    if type(processor) is MinTokensLogitsProcessor:
        return bool(processor.min_toks)
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    return True


def first_largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the place of each row's largest logit, of equal ones the first, int64 [n].

    PyTorch on CPUs finds a largest number much faster than its place, so the place is only looked for in one block.

    Args:
        logits: [n, vocab_size].
    """
    block = gcd(logits.shape[1], BLOCK)
    if block < LEAST_BLOCK:
        return logits.max(dim=-1).indices
    blocks = logits.unflatten(1, (-1, block))
    chosen = blocks.amax(dim=-1).max(dim=-1).indices
    inside = blocks[torch.arange(len(logits), device=logits.device), chosen]
    return chosen * block + inside.max(dim=-1).indices


def take_largest(
    metadata: SpecDecodeMetadata, logits: torch.Tensor, final: Sequence[Collection[int]] | None = None
) -> SamplerOutput:
    """Accept draft tokens as long as each has the largest logit, and add the token that has it where one has not.

    vLLM's rejection sampler chooses the same tokens (of equal logits the first) after it has copied the logits of all
    draft tokens three times, twice of them in float32.

    Args:
        metadata: Which logits belong to which draft token.
        logits: [num_draft_tokens + num_requests, vocab_size].
        final: See ``sample_in_turn``.

    Returns:
        Token ids, int32 [num_requests, longest draft + 1], with vLLM's placeholder after the last one of each request.
    """
    best = first_largest(logits).to(torch.int32)
    if metadata.max_spec_len == 0:
        return SamplerOutput(best[metadata.bonus_logits_indices].unsqueeze(1), None)
    targets, bonus = best[metadata.target_logits_indices], best[metadata.bonus_logits_indices]
    if final is not None:
        flags = [n in of for of, count in zip(final, metadata.num_draft_tokens, strict=True) for n in range(count)]
        targets = torch.where(torch.tensor(flags, device=logits.device), metadata.draft_token_ids, targets)
    device, longest = logits.device, metadata.max_spec_len
    counts = torch.tensor(metadata.num_draft_tokens, device=device)
    drafted = torch.arange(longest, device=device) < counts[:, None]
    chosen = torch.full((len(counts), longest + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device)
    chosen[:, :-1][drafted] = targets
    chosen.scatter_(1, counts[:, None], bonus[:, None])
    agreed = torch.zeros(len(counts), longest, dtype=torch.bool, device=device)
    agreed[drafted] = metadata.draft_token_ids == targets
    accepted = agreed.cumprod(dim=1).sum(dim=1)
    rejected = torch.arange(longest + 1, device=device) > accepted[:, None]
    return SamplerOutput(chosen.masked_fill_(rejected, PLACEHOLDER_TOKEN_ID), None)


def _one_each(sampling: SamplingMetadata, rows: Sequence[int], num_requests: int) -> SamplingMetadata:
    """Return what a batch samples one token of each request by; only the generators of ``rows`` move on."""
    generators = {row: sampling.generators[row] for row in rows if row in sampling.generators}
    return replace(sampling, generators=generators, spec_token_ids=[[] for _ in range(num_requests)])


def sample_in_turn(
    sampler: Callable[..., SamplerOutput],
    metadata: SpecDecodeMetadata,
    logits: torch.Tensor,
    sampling: SamplingMetadata,
    outputs: Sequence[list[int]],
    final: Sequence[Collection[int]] | None = None,
) -> SamplerOutput:
    """Sample each request's tokens one after the other, as plain decoding does, until one is not the draft's.

    A draft token is thus accepted with the probability that the full model gives it, and what is sampled in its place
    is distributed as the full model's other tokens are: speculative sampling (Leviathan et al. 2023, arXiv:2211.17192,
    appendix A.1) of a draft that is certain of itself. vLLM's sampler, its logits processors and its generators see
    what they see in plain decoding, in the same order, so whatever they support is supported, and a request with a seed
    samples the tokens that it samples there.

    Args:
        sampler: vLLM's sampler.
        metadata: Which logits belong to which draft token.
        logits: [num_draft_tokens + num_requests, vocab_size].
        sampling: Of the batch.
        outputs: The tokens generated so far, as logits processors know them; grown meanwhile, as before afterwards.
        final: For each request which of its draft tokens, counted from 0, are accepted in any case. They are not
            sampled, so there are no log-probabilities of theirs.

    Returns:
        Token ids, int32 [num_requests, most tokens sampled], with vLLM's placeholder after the last one of each
        request, and the log-probabilities of every place in that table if they are asked for.
    """
    drafts = [draft.tolist() for draft in metadata.draft_token_ids.split(metadata.num_draft_tokens)]
    at = [0, *accumulate(1 + len(draft) for draft in drafts)][:-1]
    going, logprobs = list(range(len(drafts))), []
    columns: list[torch.Tensor] = []
    kept = [0] * len(drafts)
    try:
        while going:
            taken = [row for row in going if final is not None and len(columns) in final[row]]
            one_each = _one_each(sampling, [row for row in going if row not in taken], len(drafts))
            sampled = sampler(logits=logits[at], sampling_metadata=one_each)
            tokens = sampled.sampled_token_ids.squeeze(-1)
            for row in taken:
                tokens[row] = drafts[row][len(columns)]
            column = torch.full_like(tokens, PLACEHOLDER_TOKEN_ID)
            column[going] = tokens[going]
            columns.append(column)
            logprobs.append(sampled.logprobs_tensors)
            said, place = tokens.tolist(), len(columns) - 1
            going = [row for row in going if place < len(drafts[row]) and said[row] == drafts[row][place]]
            for row in going:
                outputs[row].append(said[row])
                kept[row] += 1
                at[row] += 1
            if going:
                for processor in sampling.logitsprocs.all:
                    processor.update_state(None)
    finally:
        for row, count in enumerate(kept):
            del outputs[row][len(outputs[row]) - count :]
    return SamplerOutput(torch.stack(columns, dim=1), _by_request(logprobs))


def sample_from_head(
    sampler: Callable[..., SamplerOutput],
    rows: Sequence[int],
    logits: torch.Tensor,
    drafts: Sequence[Sequence[int]],
    sampling: SamplingMetadata,
    outputs: Sequence[list[int]],
) -> torch.Tensor:
    """Let some requests sample from other logits than the full model's, with all their parameters.

    Args:
        sampler: vLLM's sampler.
        rows: The requests' rows in the batch.
        logits: For each of them, float32 [n, vocab_size].
        drafts: What is to follow each of their generated tokens before.
        sampling: Of the batch.
        outputs: See ``sample_in_turn``.

    Returns:
        Token ids, int64 [n].
    """
    whole = logits.new_zeros(len(outputs), logits.shape[1])
    whole[list(rows)] = logits
    alone = replace(_one_each(sampling, rows, len(outputs)), max_num_logprobs=None, logprob_token_ids=None)
    for row, draft in zip(rows, drafts, strict=True):
        outputs[row].extend(draft)
    try:
        tokens = sampler(logits=whole, sampling_metadata=alone).sampled_token_ids.squeeze(-1)
    finally:
        for row, draft in zip(rows, drafts, strict=True):
            del outputs[row][len(outputs[row]) - len(draft) :]
    return tokens[list(rows)].to(torch.int64)


def _by_request(places: Sequence[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Return the log-probabilities of [num_requests] tokens at each place as those of [num_requests * places]."""
    if places[0] is None:
        return None
    known = cast(Sequence[LogprobsTensors], places)

    def joined(name: str) -> torch.Tensor:
        return torch.stack([getattr(one, name) for one in known], dim=1).flatten(0, 1)

    return LogprobsTensors(joined("logprob_token_ids"), joined("logprobs"), joined("selected_token_ranks"))
