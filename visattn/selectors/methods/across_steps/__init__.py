"""Methods whose choices serve several denoising steps."""
