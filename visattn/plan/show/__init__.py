"""Text, terminal and page views of a plan."""
