"""Edits of attention calls and blocks, one file for each kind."""
