"""Reshard the optimizer state of a checkpoint to any parallel layout."""
