"""Checkpoints of one format written as another."""
