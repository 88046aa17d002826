"""Attention over the blocks that a selector chose."""
