"""Prompt lookup: what followed when a sequence's newest tokens last occurred in it."""

from dataclasses import dataclass

import numpy as np

SHORTEST, LONGEST = 1, 8
"""Tokens that must have occurred before, and how many are looked at."""


@dataclass(frozen=True)
class Repeat:
    """Newest tokens of a sequence that occurred in it before.

    Attributes:
        length: How many, ``SHORTEST`` to ``LONGEST``; 0 if there are not enough.
        tokens: What followed then.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()


def repeat_in(tokens: np.ndarray, most: int) -> Repeat:
    """Find the last place where the longest run of newest tokens occurred before.

    Places that are followed by ``most`` tokens go before later ones that are not.

    Args:
        tokens: A sequence, int [n].
        most: How many of the tokens that follow are wanted.
    """
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    length = min(1, len(ends))
    while 0 < length < LONGEST:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if length < SHORTEST:
        return Repeat()
    followed = ends[ends + most < len(tokens)]
    start = 1 + int(followed[-1] if len(followed) else ends[0])
    return Repeat(length, tuple(tokens[start : start + most].tolist()))
