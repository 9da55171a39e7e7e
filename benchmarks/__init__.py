"""Measurements behind every number in the docs. Results are committed in `benchmarks/results` with the command."""
