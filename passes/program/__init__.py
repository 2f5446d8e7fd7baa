"""The typed program that passes rewrite, its text form and verifier, the plan they act on, and the pass manager."""
