"""Inspects a compiled model: where a step's time goes, and where values stop being finite."""
