"""Pictures of patterns and plans."""
