"""The Q-Former, the frozen towers and the two stages."""
