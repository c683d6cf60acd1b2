"""Parameters and memory of a run without weights."""
