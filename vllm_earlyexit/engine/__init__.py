"""All that runs inside vLLM. Only this package imports vLLM's internals; only seams.py changes them."""
