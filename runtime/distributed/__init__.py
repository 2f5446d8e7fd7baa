"""Processes that train together, and the parts of tensors and chunks that each of them has."""
