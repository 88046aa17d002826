"""The cases of scripts/trials.py: one file an area, each with ``CASES``, a tuple of ``Case``."""
