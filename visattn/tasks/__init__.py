"""Pieces of work whose results are kept in a folder, and shared by several processes."""
