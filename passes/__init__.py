"""The Program and the passes that rewrite it, one file per pass."""
