"""What ``head_errors.py`` compares and draws."""
