"""How tensors are divided over processes: tables of placements, rules of operators, the engine that applies them."""
