"""Async scheduling: a step is scheduled while the one before it still runs, with room for the longest drafts.

Before the step is run it is known what was drafted, and workers cut it down to that: no layer runs over room that
nobody needs, and every count is what it would be if the scheduler had waited. Model Runner V2 only.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_earlyexit.engine import responses

PLACEHOLDER = -1
"""vLLM's, for a draft token that is not known yet."""
SHARE = 2
"""Room for drafts takes at most one in so many of the tokens that a step may have."""
SURPLUS = "self_exit_surplus"


def cut_down(output: Any, drafted: Mapping[str, int], computed: Mapping[str, int]) -> tuple[Any, dict[str, int]]:
    """Return a step as it is run, and how much of the room for each request's draft is not needed.

    Args:
        output: vLLM's ``SchedulerOutput``; not changed, since the scheduler goes on with it.
        drafted: Tokens drafted for each request, by its id.
        computed: Tokens whose KV is written, of requests that have sampled. The scheduler counts drafts of which it
            does not yet know whether they were accepted.
    """
    rooms = output.scheduled_spec_decode_tokens
    surplus = {
        req_id: more
        for req_id, room in rooms.items()
        if PLACEHOLDER in room and (more := len(room) - drafted.get(req_id, 0)) > 0
    }
    counts = {req_id: count - surplus.get(req_id, 0) for req_id, count in output.num_scheduled_tokens.items()}
    cut = {req_id: room[: len(room) - surplus.get(req_id, 0)] for req_id, room in rooms.items()}
    cached = output.scheduled_cached_reqs
    each = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    exact = [computed.get(req_id, count) for req_id, count in each]
    run = replace(
        output,
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens={req_id: room for req_id, room in cut.items() if room},
        scheduled_cached_reqs=replace(cached, num_computed_tokens=exact),
    )
    return run, surplus


def without_surplus(grammar: Any, planned: Mapping[str, int], surplus: Mapping[str, int]) -> Any:
    """Return vLLM's ``GrammarOutput`` without the masks of tokens that are not run.

    Args:
        grammar: Has one mask for each token that a request may sample, one request after the other.
        planned: How many draft tokens there was room for, by request.
        surplus: See ``cut_down``.
    """
    rows: list[int] = []
    start = 0
    for req_id in grammar.structured_output_request_ids:
        room = planned.get(req_id, 0)
        rows += range(start, start + 1 + room - surplus.get(req_id, 0))
        start += 1 + room
    return replace(grammar, grammar_bitmask=np.ascontiguousarray(grammar.grammar_bitmask[rows]))


def attach(output: Any, surplus: Mapping[str, int]) -> None:
    """Attach to a step's output which room was not needed."""
    responses.attach(output, SURPLUS, surplus)


def discount(scheduled: Any, output: Any) -> None:
    """Let vLLM's scheduler count what was drafted instead of the room that there was for it."""
    surplus = getattr(output, SURPLUS, {})
    if surplus:
        invalid = scheduled.num_invalid_spec_tokens or {}
        most = {req_id: max(count, invalid.get(req_id, 0)) for req_id, count in surplus.items()}
        scheduled.num_invalid_spec_tokens = invalid | most


def room(longest: int, num_tokens: int, max_num_seqs: int) -> list[int]:
    """Return for each number of requests that decode, 0 to ``max_num_seqs``, how long drafts may be.

    Args:
        longest: The longest draft.
        num_tokens: Tokens that a step may have; prompts shall find room among them, too.
        max_num_seqs: vLLM's.
    """
    shares = [num_tokens // SHARE // max(1, n) - 1 for n in range(max_num_seqs + 1)]
    return [max(0, min(longest, share)) for share in shares]
