"""Run from a checkout: `python -m benchmarks.gpu`, `python -m benchmarks.accuracy` and others."""
