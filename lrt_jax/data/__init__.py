"""Data: documents (corpus), tokens (tokenizer) and rows of tokens (pipeline)."""
