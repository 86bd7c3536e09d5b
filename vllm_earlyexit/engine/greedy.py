"""Greedy verification without copies of the logits."""

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, LogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


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


def _changes_logits(processor: LogitsProcessor) -> bool:
    """Return whether a logits processor may do something; of others than vLLM's own that is not known."""
    if type(processor) is MinTokensLogitsProcessor:
        return bool(processor.min_toks)
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    return True


def verify(metadata: SpecDecodeMetadata, logits: torch.Tensor) -> SamplerOutput:
    """Accept draft tokens as long as each has the largest logit, and add the token that has it where one has not.

    vLLM's rejection sampler chooses the same tokens (of equal logits the first) after it has copied the logits of all
    draft tokens three times, twice of them in float32.

    Args:
        metadata: Which logits belong to which draft token.
        logits: [num_draft_tokens + num_requests, vocab_size].

    Returns:
        Token ids, int32 [num_requests, longest draft + 1], with vLLM's placeholder after the last one of each request.
    """
    best = logits.max(dim=-1).indices.to(torch.int32)
    targets, bonus = best[metadata.target_logits_indices], best[metadata.bonus_logits_indices]
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
