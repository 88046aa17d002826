"""The backends of attention: each computes the same numbers."""
