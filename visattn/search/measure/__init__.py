"""What the search measures: errors, latencies, videos."""
