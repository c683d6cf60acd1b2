"""Images with texts: reading, checking, augmenting, batching, caching of frozen features."""
