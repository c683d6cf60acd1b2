"""Objectives, optimizer, checkpoints and the one training loop."""
