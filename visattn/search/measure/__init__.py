"""Measurements of the search: errors, latencies, clips."""
