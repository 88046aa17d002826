"""Which of several processes this one is, by what started them, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["ProcessGroup", "Processes", "join", "one_process", "own_device", "processes"]

# Variables of rank, number of processes and rank on the machine, by what starts the processes.
# A batch script of SLURM has SLURM_PROCID too; only in a step of srun are there several processes.
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
MEETING = timedelta(minutes=10)  # in which all processes have to start
LONGEST = timedelta(days=7)  # that one waits for another at its work


class Processes(NamedTuple):
    """One of several processes that were started together.

    Attributes:
        rank: its number; world: how many there are; local: its number on its machine.
        starter: what started them, in words.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    starter: str = ""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def processes() -> Processes:
    """This process: by torch.distributed where that is initialized, else by the environment.

    Raises:
        ValueError: the variables of the environment are no such numbers.
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
            own = Processes(int(given[0]), int(given[1]), int(given[2] or 0), starter)
        except ValueError:
            own = Processes(-1)
        if not (0 <= own.rank < own.world and own.local >= 0):
            said = ", ".join(f"{name}={os.environ.get(name)!r}" for name in names)
            raise ValueError(f"the environment has {said}, which number no process; unset them")
        return own
    return Processes()


def own_device(device: torch.device) -> torch.device:
    """A device by its kind alone, such as ``cuda``, as that of this process: one each, by the rank
    on the machine. With one process, with an index, or on a CPU it stays what it is."""
    own = processes()
    if own.world == 1 or device.index is not None or device.type in ("cpu", "mps"):
        return device
    count = max(1, torch.accelerator.device_count())  # 1 where each process sees its own alone
    return torch.device(device.type, own.local % count)


def one_process(what: str) -> None:
    """Refuse to do a thing in several processes.

    Raises:
        ValueError: there are several.
    """
    own = processes()
    if own.world > 1:
        raise ValueError(
            f"{what} runs in one process, and this is number {own.rank} of {own.world} of "
            f"{own.starter}; start it alone"
        )


class ProcessGroup:
    """What the processes tell each other. All of them make the same calls, in the same order.

    Attributes:
        own: this process; with one alone every call returns at once.
    """

    def __init__(self, own: Processes | None = None, handle: Any = None) -> None:
        self.own = own or Processes()
        self._handle = handle

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks, when all have come here.

        Raises:
            ConnectionError: one of them ended before.
        """
        if self._handle is None:
            return [value]
        found: list[Any] = [None] * self.own.world
        try:
            dist.all_gather_object(found, value, group=self._handle)
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.own.rank} of {self.own.world} waits for another, which ended with "
                f"an error of its own ({' '.join(str(error).split())[:100]})"
            ) from None
        return found

    def of_first(self, value: Any) -> Any:
        """The value of the first process."""
        return self.gather(value)[0]

    def check_same(self, value: Any, what: str) -> None:
        """Refuse processes that are about different things.

        Raises:
            ValueError: a process has another value than the first one.
        """
        found = self.gather(value)
        for rank, own in enumerate(found):
            if own != found[0]:
                raise ValueError(
                    f"process {rank} has another {what} than process 0; start all with the same"
                )

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.gather(None)


@contextmanager
def join(what: str | None = None) -> Iterator[ProcessGroup]:
    """The group of all processes inside a ``with`` block. It talks over the network (gloo), beside
    a group of torch.distributed that there may be.

    Args:
        what: needs the group, for the error; None: where the processes cannot meet, each is alone
            in a group, and only its number says that there are others.

    Raises:
        ValueError: they cannot meet.
    """
    own = processes()
    there = dist.is_available() and dist.is_initialized()
    meet = there or all(name in os.environ for name in RENDEZVOUS)
    if own.world > 1 and not meet and what is not None:
        raise ValueError(
            f"{what} in {own.world} processes needs {' and '.join(RENDEZVOUS)} in the environment, "
            f"which {own.starter} does not set; start it by torchrun --nproc_per_node N"
        )
    if own.world == 1 or not meet:
        yield ProcessGroup(own)
        return
    if not there:
        dist.init_process_group("gloo", rank=own.rank, world_size=own.world, timeout=MEETING)
    handle = dist.new_group(backend="gloo", timeout=LONGEST)
    try:
        yield ProcessGroup(own, handle)
    finally:
        dist.destroy_process_group(handle if there else None)
