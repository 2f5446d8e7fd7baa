"""Pipeline schedules: made, checked before they run, and simulated."""
