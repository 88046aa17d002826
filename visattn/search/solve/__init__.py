"""The choice of one candidate for each head."""
