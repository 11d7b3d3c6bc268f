"""The decoder with recurrent memory, and what it costs."""
