"""CapFilt: captions written and filtered by models."""
