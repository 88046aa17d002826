"""The process and its settings: torch's modes, several processes, temporary files."""
