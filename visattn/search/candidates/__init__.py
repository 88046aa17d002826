"""The attention that the search considers for a head."""
