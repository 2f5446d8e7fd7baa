"""Schedules of pipelines: made, checked before they run, and run on a clock."""
