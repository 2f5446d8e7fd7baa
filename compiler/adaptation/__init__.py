"""What a plan is adapted to in training: measured times and peaks, and less memory than there was."""
