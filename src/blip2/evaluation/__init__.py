"""Metric functions on arrays and strings."""
