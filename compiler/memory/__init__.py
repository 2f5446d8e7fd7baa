"""Memory: the device and the host, how much of either can be had, and what steps use of it."""
