"""Adapts a plan during training: to measured times and peaks, and to less memory than there was."""
