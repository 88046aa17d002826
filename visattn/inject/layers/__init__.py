"""A layer with a plan: what its heads run at a call."""
