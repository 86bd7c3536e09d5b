"""Verification on Model Runner V2: each position samples as plain decoding would, and agrees with the draft or not."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class PlainSampler(RejectionSampler):
    """Samples every position of a draft as V2's sampler does without drafts, and keeps what agrees with the draft.

    A draft token is thus accepted with the probability that the full model gives it, and what stands in its place is
    distributed as the full model's other tokens are: speculative sampling (Leviathan et al. 2023, arXiv:2211.17192,
    appendix A.1) of a draft that is certain of itself. V2's random numbers depend on a request's seed and the position
    alone, so that, unlike with vLLM's own rejection sampler, a seed gives the same tokens whatever is drafted.

    Args:
        plain: V2's sampler.
        speculative: vLLM's ``SpeculativeConfig``.
        device: Where logits are.
        left: From a batch to which of its logits are for a draft token that has left, so that it is kept in any case,
            bool [num_logits]; None if none are.
    """

    def __init__(
        self,
        plain: Any,
        speculative: Any,
        device: torch.device,
        left: Callable[[InputBatch], torch.Tensor | None],
    ):
        super().__init__(plain, speculative, device)
        self._left_of = left
        self.choices: list[torch.Tensor] = []
        """What was sampled at the last batch's logits, int64 [num_logits] in all; kept if something has left."""

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch, *drafts: Any, **others: Any) -> Any:
        """Verify a batch; arguments and result are vLLM's."""
        self._left, self.choices = self._left_of(input_batch), []
        return super().__call__(logits, input_batch, *drafts, **others)

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: Any,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sampler = self.sampler
        processed = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        tokens = _sample(sampler, processed, expanded_idx_mapping, pos)
        left = None
        if self._left is not None:
            done = sum(map(len, self.choices))
            left = self._left[done : done + len(tokens)]
            self.choices.append(tokens)
        width = self.num_speculative_steps + 1
        return processed, *kept(tokens, verify_draft_sampled, expanded_local_pos, len(idx_mapping), width, left)

    @staticmethod
    def draw(sampler: Any, rows: Sequence[int], positions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Sample as verification will after tokens at these positions, as far as that depends on temperature alone."""
        return _sample(sampler, logits, torch.tensor(rows, device=logits.device), positions, temperature=True)

    @staticmethod
    def lets_leave(sampler: Any, params: Any) -> bool:
        """Return whether a request may sample from exit heads: not beside what keeps books of sampled tokens.

        Args:
            sampler: V2's.
            params: The request's sampling parameters.
        """
        known = (LogitBiasState, PenaltiesState, BadWordsState)
        return params.thinking_token_budget is None and all(type(one) in known for one in sampler.logits_processors)

    @staticmethod
    def sample_from_head(
        sampler: Any,
        rows: Sequence[int],
        logits: torch.Tensor,
        drafts: Sequence[Sequence[int]],
        newest: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Let some requests sample from other logits than the full model's, with all their parameters.

        V2's sampler learns of drafts from the tokens that stand before a token in its batch. So each request's newest
        token and its draft are laid out as if they were verified, and of these places only the last one is sampled.

        Args:
            sampler: V2's.
            rows: The requests' rows in its states.
            logits: For each of them, float32 [n, vocab_size].
            drafts: What is to follow the newest token of each before.
            newest: That token and its position.

        Returns:
            Token ids, int64 [n].
        """
        counts = [1 + len(draft) for draft in drafts]
        fed = [token for (first, _), draft in zip(newest, drafts, strict=True) for token in (first, *draft)]
        depth = [place for count in counts for place in range(count)]
        starts = [position for (_, position), count in zip(newest, counts, strict=True) for _ in range(count)]
        device = logits.device
        each, index = torch.tensor(counts, device=device), torch.tensor(rows, dtype=torch.int32, device=device)
        local = torch.tensor(depth, dtype=torch.int32, device=device)
        positions = torch.tensor(starts, device=device) + local
        processed = sampler.apply_sampling_params(
            logits.repeat_interleave(each, dim=0),
            index.repeat_interleave(each),
            index,
            np.array(rows),
            positions,
            torch.tensor(fed, dtype=torch.int32, device=device),
            local,
            np.array([position + count for (_, position), count in zip(newest, counts, strict=True)]),
        )
        last = each.cumsum(0) - 1
        return _sample(sampler, processed[last], index, positions[last]).to(torch.int64)


def kept(
    tokens: torch.Tensor,
    fed: torch.Tensor,
    depth: torch.Tensor,
    num_seqs: int,
    width: int,
    left: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each sequence keeps of what was sampled after its newest token and each token of its draft.

    Nothing here waits for the device.

    Args:
        tokens: What was sampled, sequence by sequence, int64 [n].
        fed: After which token, int [n]; -1 for a draft token that is not to be accepted.
        depth: How many draft tokens there are up to that one, int [n]; 0 begins a sequence.
        num_seqs: How many sequences there are.
        width: The longest draft, and one more.
        left: Where the draft token is kept in any case, bool [n]; None for nowhere.

    Returns:
        The tokens, int64 [num_seqs, width], and how many of them are kept, at least one each, int32 [num_seqs].
    """
    sequence = (depth == 0).cumsum(0) - 1
    drafted = torch.cat([fed[1:], fed.new_full((1,), -1)])
    goes_on = torch.cat([depth[1:] > 0, depth.new_zeros(1, dtype=torch.bool)])
    drafts = goes_on & (drafted >= 0)
    tokens = tokens if left is None else torch.where(left & drafts, drafted.to(tokens.dtype), tokens)
    right = drafts & (tokens == drafted)
    whole, accepted = tokens.new_zeros(num_seqs, width), depth.new_zeros(num_seqs, width, dtype=torch.int32)
    at = sequence.long(), depth.long()
    whole.index_put_(at, tokens)
    accepted.index_put_(at, right.to(torch.int32))
    return whole, 1 + accepted.cumprod(dim=1, dtype=torch.int32).sum(dim=1, dtype=torch.int32)


def _sample(
    sampler: Any, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: bool = False
) -> torch.Tensor:
    """Sample with the random numbers that V2 has for these rows and positions, with their temperature if asked to."""
    states = sampler.sampling_states
    return gumbel_sample(
        logits,
        rows,
        states.temperature.gpu,
        states.seeds.gpu,
        positions,
        apply_temperature=temperature,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )
