"""The solver: it chooses one candidate for each head."""
