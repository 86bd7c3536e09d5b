"""Benchmarks: each module is a command and says so in its first lines."""
