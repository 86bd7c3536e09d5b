"""Triton's interpreter for processes that vLLM starts; tests put this folder on their PYTHONPATH."""

from tests import interpreter

interpreter.stand_in()
interpreter.take_integers_as_masks()
