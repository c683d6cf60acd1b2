"""One script per claim of speed; `python -m benchmarks.run` runs them all."""
