"""How the calls of a pipeline, a denoiser and its attention are intercepted."""
