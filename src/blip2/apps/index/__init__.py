"""Search in photographs: an index of query embeddings on disk, and what looks in it."""
