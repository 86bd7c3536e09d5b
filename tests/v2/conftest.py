"""Fixtures of the engine's tests that are wanted here, too."""

from tests.engine.conftest import ladder

__all__ = ["ladder"]
