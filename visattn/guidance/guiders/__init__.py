"""Guidances such as PAG, SEG and NAG: how the predictions of the denoiser are combined, and how
this is added to pipelines."""
