"""The steps from q and k to the chosen blocks."""
