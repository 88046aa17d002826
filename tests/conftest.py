"""What holds for every test: one torch thread, and interpreted kernels where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():  # true for HIP as well
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

from visattn._compat import ensure_torchvision

ensure_torchvision()
torch.set_num_threads(1)
