"""Weights and numbers from elsewhere: the authors' names and layout, files, and the check against them."""
