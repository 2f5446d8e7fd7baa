"""What is recognised in a program."""
