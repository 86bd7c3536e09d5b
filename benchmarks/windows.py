"""Generated tokens over time, from what ``vllm bench serve --save-detailed`` keeps of each request."""

from itertools import accumulate
from typing import Any

SECONDS = 10
"""Length of a window."""


def token_times(detailed: dict[str, Any]) -> list[tuple[float, float]]:
    """Return when tokens came, in seconds from the first request's start, and how many of them each time.

    A chunk of a stream may hold several tokens, and only their sum is known of a request: its tokens are spread evenly
    over its chunks.
    """
    began = min(detailed["start_times"])
    requests = zip(*(detailed[key] for key in ("start_times", "ttfts", "itls", "output_lens")), strict=True)
    found = []
    for start, first, gaps, tokens in requests:
        chunks = list(accumulate(gaps, initial=start + first - began))
        found += [(chunk, tokens / len(chunks)) for chunk in chunks]
    return sorted(found)


def tokens_by_window(times: list[tuple[float, float]]) -> list[float]:
    """Return the tokens of each full window from the start; what comes after the last full one is left out."""
    full = int(times[-1][0] // SECONDS)
    counts = [0.0] * full
    for time, tokens in times:
        if time < full * SECONDS:
            counts[int(time // SECONDS)] += tokens
    return counts


def relative(detailed: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    """Return for each window that is full for both what one server generated over what plain vLLM did."""
    ours, base = (tokens_by_window(token_times(one)) for one in (detailed, plain))
    return [round(a / b, 3) for a, b in zip(ours, base, strict=False)]
