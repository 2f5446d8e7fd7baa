"""From calls of a model to the programs that run them, and the cache of those."""
