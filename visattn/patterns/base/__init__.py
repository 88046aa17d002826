"""What all static patterns share: the base class, patterns by axes, sizes."""
