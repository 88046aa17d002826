"""Edits of attention: one file for each kind."""
