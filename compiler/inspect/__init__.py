"""Looking at a compiled model: where a step's time goes, where values stop being finite."""
