"""Where a model looks, and what its scores depend on."""
