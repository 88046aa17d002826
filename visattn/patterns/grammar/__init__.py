"""The written form of patterns, and the grammar of calls that it is written in."""
