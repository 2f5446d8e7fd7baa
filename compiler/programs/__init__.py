"""Turns calls of a model into the programs that run them, and caches these."""
