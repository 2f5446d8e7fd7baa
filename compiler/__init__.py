"""What a person drives: compile(), capture, the planner, the command line."""
