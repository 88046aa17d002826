"""``visattn env``: versions and devices for a bug report; no paths and no variables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform

import torch

from visattn._version import __version__
from visattn.attention import BACKENDS, BackendUnavailable, choose_backend

PACKAGES = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "timm",
    "pillow",
    "imageio-ffmpeg",
)
MISSING = "not installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    info = environment()
    if args.json:
        keyed = {name.lower().replace(" ", "_"): value for name, value in info.items()}
        return json.dumps(keyed, indent=2, sort_keys=True)
    lines = ["Copy the text below into your issue.", ""]
    for name, value in info.items():
        words = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"- {name}: {'none' if words in (None, '') else words}")
    return "\n".join(lines)


def environment() -> dict[str, object]:
    """Return versions and devices by name; of the packages only torch is imported."""
    info: dict[str, object] = {
        "visattn": __version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "HIP": torch.version.hip,
        "Devices": devices(),
    }
    info |= {name: version_of(name) for name in PACKAGES}
    sample = torch.empty(1, 1, 1, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_backend("auto", sample)
    return info | {
        "CPU cores": os.cpu_count(),
        "CPU threads of torch": torch.get_num_threads(),
        "Backends": [name for name in BACKENDS if name != "auto" and can_run(name, sample)],
        "Backend of auto": f"{chosen.backend} ({chosen.reason})",
    }


def can_run(backend: str, sample: torch.Tensor) -> bool:
    """Return whether a backend runs on tensors like the sample."""
    try:
        choose_backend(backend, sample)
    except BackendUnavailable:
        return False
    return True


def devices() -> list[str]:
    """Return the names of the accelerators that torch finds."""
    if torch.cuda.is_available():  # true for HIP as well
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [f"{item.name} ({item.total_memory / 2**30:.0f} GiB)" for item in properties]
    return ["Apple MPS"] if torch.backends.mps.is_available() else []


def version_of(name: str) -> str:
    """Return the version of an installed package without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
