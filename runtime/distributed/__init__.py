"""Processes that train together, and each one's shards of tensors and chunks."""
