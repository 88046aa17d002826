"""The device, dtype and repeats of a measurement: options of all benchmarks."""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass

import torch

from visattn._version import __version__
from visattn.cli.env import devices, version_of

__all__ = ["Machine", "add_machine", "at_least_one", "read_machine"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """A device, the name of the dtype, and the number of repeats of a measurement."""

    device: str
    name: str
    repeats: int

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def where(self) -> dict[str, object]:
        """Return the device, the dtype and the versions as JSON values."""
        return {
            "visattn": __version__,
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "device": ", ".join(devices()) if self.gpu else platform.machine(),
            "threads": torch.get_num_threads(),
            "dtype": self.name,
            "repeats": self.repeats,
        }


def add_machine(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of tensors (default float32; on a GPU bfloat16)"
    )
    parser.add_argument("--device", help="device that computes (default: a GPU if there is one)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        metavar="N",
        help="timed repeats (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse arguments below 1.

    Raises:
        ValueError: an argument is below 1.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


def read_machine(args: argparse.Namespace) -> Machine:
    """Return the machine of the arguments.

    Raises:
        ValueError: there is no such device, or the number of repeats is below 1.
    """
    at_least_one(args, "repeats")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}; leave it out "
            "for the default"
        ) from None
    gpu = device.startswith("cuda")
    return Machine(device, args.dtype or ("bfloat16" if gpu else "float32"), args.repeats)
