"""The planner: memory and time of a program under any plan, and the search for the best plan that fits."""
