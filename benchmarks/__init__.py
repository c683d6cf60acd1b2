"""Measurements: `claims/` of speed, the `sides/` they compare, `experiments/` behind the documentation, `harness/`."""
