"""Several prompts, subjects or scenes in one generation."""
