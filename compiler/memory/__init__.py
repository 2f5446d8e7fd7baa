"""Memory of the device and the host: how much of it is available, and how much steps use."""
