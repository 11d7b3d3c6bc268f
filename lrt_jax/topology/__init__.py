"""What a config would need and do on a TPU slice that is not there: memory, traffic, time."""
