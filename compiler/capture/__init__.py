"""Turns a model and a call into a program: tracing, guards, refusals, arguments, results, values for `meta` models."""
