"""The part that users drive: `compile()`, capture, the planner and the command line."""
