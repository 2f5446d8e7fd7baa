"""How a world of processes shares the work where nobody has said: what each way takes, and which one is chosen."""
