"""A page about one run or several: read from work dirs, measured on checkpoints, drawn and written."""
