"""Text from a language model that sees an image."""
