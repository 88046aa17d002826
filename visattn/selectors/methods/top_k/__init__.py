"""Methods that keep a number, or a share, of the blocks of highest score."""
