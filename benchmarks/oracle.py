"""An exit policy that knows the answer: tokens leave where, and only where, the head says what plain decoding says."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_earlyexit.engine.early_exit import MODE

PLAIN = {MODE: "off"}
"""What requests ask for to be decoded plainly."""


class Oracle:
    """Lets tokens of an in-process engine on Model Runner V1 leave by what plain decoding has generated.

    With fill-in ``resume`` outputs are those of plain decoding. With ``propagate`` the full model sees other KV and may
    go another way; from there on the oracle knows nothing, and nothing leaves.

    Args:
        adapter: The engine's proposer, serving early exits.
    """

    def __init__(self, adapter: Any):
        self.known: dict[str, Sequence[int]] = {}
        """Plain outputs, by request."""
        self._requests: Sequence[Any] = ()
        self._draft, self._leave = adapter.draft, adapter.drafter._leave
        adapter.draft, adapter.drafter._leave = self._drafting, self._leaving

    def _drafting(self, runner: Any, requests: Sequence[Any], *arguments: Any, **keywords: Any) -> list[list[int]]:
        self._requests = requests
        return self._draft(runner, requests, *arguments, **keywords)

    def _leaving(
        self, rows: torch.Tensor, asked: Any, cut: int, position: int, frontier: Any, leaving: Any
    ) -> tuple[Any, torch.Tensor | None]:
        if leaving is None:
            return asked, None
        said = zip(rows.tolist(), asked.token_ids.tolist(), strict=True)
        final = [
            leaving.limits[row] is not None and self._next(self._requests[row], frontier.draft(row)) == token
            for row, token in said
        ]
        return asked, torch.tensor(final)

    def _next(self, request: Any, draft: list[int]) -> int | None:
        """Return plain decoding's next token behind what a request has and what is drafted for it, if it went alike."""
        known, said = self.known.get(request.req_id, ()), [*request.output_token_ids, *draft]
        return known[len(said)] if len(said) < len(known) and list(known[: len(said)]) == said else None
