"""The search for a plan, and what a plan costs."""
