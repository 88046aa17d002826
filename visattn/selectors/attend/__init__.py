"""Attention by the blocks that a selector chose."""
