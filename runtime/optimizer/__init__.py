"""Our own optimizer: what it keeps of each chunk, and the updates that run beside the program."""
