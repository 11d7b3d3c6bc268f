"""Several runs compared at equal effective compute."""
