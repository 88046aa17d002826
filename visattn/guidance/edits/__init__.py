"""Edits of attention calls and blocks, one file for each kind. Guidances, also NAG, are in
``visattn.guidance.guiders``."""
