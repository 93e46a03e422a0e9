"""Checkpoints in and out: where a model comes from, what its files say, and how a pruned one is written."""
