"""The Querying Transformer."""
