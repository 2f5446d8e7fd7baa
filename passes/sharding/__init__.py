"""How tensors are divided over processes: tables of placements, operator rules, and the engine that applies them."""
