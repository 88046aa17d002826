"""Tasks of a search: run once, by one of several processes, and kept."""
