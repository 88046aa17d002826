"""The processes of a run: their ranks, as the launcher sets them, and exchange between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["ProcessGroup", "Processes", "device_of_process", "join", "one_process", "processes"]

# By launcher, the environment variables of the rank, the number of processes and the rank on the
# machine. A batch script of SLURM has SLURM_PROCID too, but only a step of srun runs several
# processes.
STARTERS = {
    "torchrun or accelerate": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun of Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "mpirun of MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
START_TIMEOUT = timedelta(minutes=10)  # time limit for all processes to start
WAIT_TIMEOUT = timedelta(days=7)  # time limit of a process that waits for the others


class Processes(NamedTuple):
    """One of several processes that were started together.

    Attributes:
        rank: the number of this process.
        world: the number of processes.
        local: the number of this process on its machine.
        starter: name of the launcher.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    starter: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints for all."""
        return self.rank == 0


def processes() -> Processes:
    """Return this process, from torch.distributed if it is initialized, else from the environment.

    Raises:
        ValueError: the environment variables hold no valid ranks.
    """
    if dist.is_available() and dist.is_initialized():
        local = os.environ.get("LOCAL_RANK", "")
        rank = dist.get_rank()
        number = int(local) if local.isdecimal() else rank
        return Processes(rank, dist.get_world_size(), number, "torch.distributed")
    for starter, names in STARTERS.items():
        given = [os.environ.get(name) for name in names]
        if given[0] is None or given[1] is None:
            continue
        try:
            process = Processes(int(given[0]), int(given[1]), int(given[2] or 0), starter)
        except ValueError:
            process = Processes(-1)
        if not (0 <= process.rank < process.world and process.local >= 0):
            variables = ", ".join(f"{name}={os.environ.get(name)!r}" for name in names)
            raise ValueError(
                f"the environment has {variables}, which are no valid ranks; unset them"
            )
        return process
    return Processes()


def device_of_process(device: torch.device) -> torch.device:
    """Return the device of this process, by its rank on the machine, for a device without an index
    such as ``cuda``. A device with an index, a CPU, and the device of a single process are returned
    unchanged."""
    process = processes()
    if process.world == 1 or device.index is not None or device.type in ("cpu", "mps"):
        return device
    count = max(1, torch.accelerator.device_count())  # 1 if each process sees one device only
    return torch.device(device.type, process.local % count)


def one_process(what: str) -> None:
    """Refuse to run in several processes.

    Args:
        what: what cannot run in several processes, for the error message.

    Raises:
        ValueError: there are several processes.
    """
    process = processes()
    if process.world > 1:
        raise ValueError(
            f"{what} runs in one process only, but this is process {process.rank} of "
            f"{process.world}, started by {process.starter}; start a single process"
        )


class ProcessGroup:
    """Exchange of values between processes. All of them must make the same calls in the same order.

    Attributes:
        process: this process. If it is the only one, every call returns at once.
    """

    def __init__(self, process: Processes | None = None, handle: Any = None) -> None:
        self.process = process or Processes()
        self._handle = handle

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes and return their values in the order of the ranks.

        Raises:
            ConnectionError: another process has ended.
        """
        if self._handle is None:
            return [value]
        values: list[Any] = [None] * self.process.world
        try:
            dist.all_gather_object(values, value, group=self._handle)
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.process.rank} of {self.process.world} waited for another process, "
                f"which has ended; see the error of that process "
                f"({' '.join(str(error).split())[:100]})"
            ) from None
        return values

    def of_first(self, value: Any) -> Any:
        """Return the value of the first process."""
        return self.gather(value)[0]

    def check_same(self, value: Any, what: str) -> None:
        """Check that all processes have the same value.

        Args:
            value: the value of this process.
            what: the name of the value, for the error message.

        Raises:
            ValueError: a process has another value than the first one.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"process {rank} has another {what} than process 0; start all with the same"
                )

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        self.gather(None)


@contextmanager
def join(what: str | None = None) -> Iterator[ProcessGroup]:
    """Connect all processes inside a ``with`` block, by gloo over the network. A process group of
    torch.distributed that exists already is left as it is.

    Args:
        what: what needs the group, for the error message. With None, processes that cannot be
            connected get a group of one process each.

    Raises:
        ValueError: the processes cannot be connected.
    """
    process = processes()
    there = dist.is_available() and dist.is_initialized()
    meet = there or all(name in os.environ for name in RENDEZVOUS)
    if process.world > 1 and not meet and what is not None:
        raise ValueError(
            f"{what} in {process.world} processes needs {' and '.join(RENDEZVOUS)} in the "
            f"environment, which {process.starter} does not set; start it by torchrun "
            "--nproc_per_node N"
        )
    if process.world == 1 or not meet:
        yield ProcessGroup(process)
        return
    if not there:
        dist.init_process_group(
            "gloo", rank=process.rank, world_size=process.world, timeout=START_TIMEOUT
        )
    handle = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    try:
        yield ProcessGroup(process, handle)
    finally:
        dist.destroy_process_group(handle if there else None)
