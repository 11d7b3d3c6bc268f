"""Timed programs that print ratios; never asserted in tests. They import neither grain nor sentencepiece."""
