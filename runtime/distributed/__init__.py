"""Processes that train together, and the shards of tensors and chunks that each of them has."""
