"""Dynamic patterns: one file for each published method."""
