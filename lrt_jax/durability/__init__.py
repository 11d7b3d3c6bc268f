"""What may end a run, and what it leaves: checkpoints, locks, signals, watchers."""
