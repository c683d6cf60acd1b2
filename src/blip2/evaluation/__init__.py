"""`blip2 evaluate`: tasks, predictions, reports."""
