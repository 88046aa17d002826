"""From the rule of a pattern to the lists of blocks that a launch reads."""
