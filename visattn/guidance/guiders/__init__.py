"""Guidances: how predictions of the denoiser are combined, and how this is added to pipelines."""
