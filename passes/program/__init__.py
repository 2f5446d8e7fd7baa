"""What passes rewrite, and what they act on: the typed program, its text, its verifier, the plan, the manager."""
