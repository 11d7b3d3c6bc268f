"""A training run: assembled, driven step by step, and reported."""
