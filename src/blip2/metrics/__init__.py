"""Metrics on arrays and strings."""
