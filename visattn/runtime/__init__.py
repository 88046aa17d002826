"""Settings of the process: modes of torch, several processes, temporary files, progress."""
