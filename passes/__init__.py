"""The passes, one per file, and the pipeline they form. The subpackages hold the program they rewrite and shared
helpers."""
