"""Guidances: what is made of the model's outputs, and the pipelines that run it."""
