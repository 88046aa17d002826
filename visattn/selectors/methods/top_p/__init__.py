"""Methods that keep the fewest blocks with a share of the attention mass."""
