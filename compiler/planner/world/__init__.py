"""How a world of processes shares the work where the user has not said: the cost of each way, and the choice of one."""
