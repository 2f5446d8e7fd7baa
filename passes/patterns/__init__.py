"""Patterns of operators that passes recognise in a program."""
