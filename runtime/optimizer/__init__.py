"""The built-in optimizer: the training state it keeps for each chunk, and updates that run beside the program."""
