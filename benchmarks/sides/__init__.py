"""What each side of a claim runs: ours, LAVIS, transformers."""
