"""Configuration, devices and shardings: what a run is, before it does anything."""
