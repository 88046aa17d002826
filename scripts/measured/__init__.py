"""What ``tune_attention.py`` and ``gpu_table.py`` are made of."""
