"""Schedules, optimizer, step, checkpoints and the loop."""
