"""The one exception that users see: a sentence with the cause and the remedy."""


class EarlyExitError(ValueError):
    """Self-exit cannot be set up as asked; the message says why and what to do."""
