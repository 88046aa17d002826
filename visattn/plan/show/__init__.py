"""Views of a plan: as data, as text for a terminal, and the difference of two plans."""
