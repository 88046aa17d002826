"""What the compile matrix is made of."""
