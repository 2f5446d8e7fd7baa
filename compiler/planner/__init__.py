"""Decides: memory and time of a program under any plan, and the search for the best one that fits."""
