"""Files, paths, processes and pages: what reads and writes outside of torch."""
