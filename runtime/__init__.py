"""The machine: instruction schemas, chunks, tiers and the executor."""
