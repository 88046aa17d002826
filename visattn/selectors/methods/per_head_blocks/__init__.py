"""Methods whose blocks differ from head to head: sorted, hashed or clustered tokens."""
