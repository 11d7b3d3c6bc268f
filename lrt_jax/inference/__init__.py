"""Decoding with the memory: one recurrent step, prefill, sampling."""
