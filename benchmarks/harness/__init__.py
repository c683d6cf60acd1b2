"""How claims are measured: processes that take turns, the result file, everything for a card."""
