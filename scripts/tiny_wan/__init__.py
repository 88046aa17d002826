"""The small text-to-video model that ships with the repository: its data, parts and training."""

import visattn  # noqa: F401  (before diffusers: it mends a torchvision that does not fit)
