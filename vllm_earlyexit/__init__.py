"""Early exits for vLLM."""
