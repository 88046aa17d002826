"""Tasks of a search, shared by the processes of ``torchrun``, kept as they are done."""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from visattn.runtime.processes import ProcessGroup
from visattn.runtime.progress import Progress
from visattn.tasks.result_store import ResultStore, StoredResult, key_of

__all__ = ["Task", "TaskResult", "TaskRunner", "Unfinished"]

TaskResult = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]


class Unfinished(RuntimeError):
    """A stage of which nothing could be done; the message has the first reason."""


class Task(NamedTuple):
    """A piece of work: what is asked, as JSON values, a label, and how it is answered."""

    question: Any
    label: str
    run: Callable[[], TaskResult]


class TaskRunner:
    """One process, or those of a group, which share a folder and split the tasks.

    Processes that share a folder without a group take tasks at different places and leave out what
    another has kept by then; two that are at the same task both do it, which wastes time only.

    Args:
        store: where results are kept.
        about: what all questions are about, as JSON values: model, shape, versions.
        progress: is told of tasks that are done.
        group: the processes; None: this one alone.

    Raises:
        ValueError: there are several processes and no folder, or they are about different things.
    """

    def __init__(
        self,
        store: ResultStore,
        about: Any,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.store, self.about, self.progress = store, about, progress
        self.group = group or ProcessGroup()
        self.world = self.group.process.world
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        if self.world > 1 and store.folder is None:
            raise ValueError(
                f"resume=None with {self.world} processes: name a folder that they share"
            )
        # Of what is timed, besides what it is about: that of the process that times.
        self.threads: int = self.group.of_first(torch.get_num_threads())
        self.group.check_same(about, "model, call, kind of device or version")

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.group.process.first

    def do(
        self,
        stage: str,
        tasks: Sequence[Task],
        *,
        alone: bool = False,
        timed: bool = False,
        needed: bool = True,
    ) -> list[StoredResult | None]:
        """Answers in the order of the tasks, None where one failed; those that are kept are not
        asked again, unless they failed.

        Args:
            alone: the first process does all of them, as what is timed must not be disturbed.
            timed: answers hold seconds, which the number of threads changes; as with ``alone``.
            needed: whether the search ends when all of them fail.

        Raises:
            Unfinished: all failed.
        """
        begin = time.perf_counter()
        of_time = [self.threads] if alone or timed else []
        keys = [key_of(stage, [self.about, task.question, *of_time]) for task in tasks]
        own = 0 if alone else self.group.process.rank
        many = 1 if alone else self.world
        mine = [n for n in range(len(tasks)) if n % many == own]
        mine = mine if not alone or self.first else []
        open_ = [n for n in mine if self._kept(keys[n]) is None]
        if self.world == 1 and open_ and self.store.folder is not None:
            start = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % len(open_)
            open_ = open_[start:] + open_[:start]  # another search may be at it in the same folder
        for done, number in enumerate(open_):
            self._tell(stage, done, len(open_), begin)
            task = tasks[number]
            if self._kept(keys[number]) is not None:  # by now
                continue
            try:
                value, tensors = task.run()
            except Exception as error:  # of any library; the other tasks go on
                text = " ".join(str(error).split())[:300] or type(error).__name__
                value, tensors = {"failed": f"{type(error).__name__}: {text}"}, {}
            if self._kept(keys[number]) is None:  # else all go on with what was kept first
                self.store.put(keys[number], value, tensors)
        if open_:
            self._tell(stage, len(open_), len(open_), begin)
        self.group.wait()
        # what one process cannot read no process uses, so that all go on with the same
        unread = self.group.gather([key for key in keys if self.store.get(key) is None])
        lost = set[str]().union(*unread)
        found: list[StoredResult | None] = []
        for key, task in zip(keys, tasks, strict=True):
            item = None if key in lost else self.store.get(key)
            if item is None or "failed" in item.value:
                why = "a process could not read it" if item is None else item.value["failed"]
                self.failures[f"{stage}: {task.label}"] = why
                item = None
            found.append(item)
        if needed and tasks and not any(item is not None for item in found):
            first = next(iter(self.failures.values()))
            raise Unfinished(f"{stage} failed for all of {len(tasks)}: {first}")
        self.store.forget()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        return found

    def broadcast(self, value: bool) -> bool:
        """What the first process says."""
        return bool(self.group.of_first(value))

    def _kept(self, key: str) -> StoredResult | None:
        item = self.store.get(key)
        return None if item is None or "failed" in item.value else item

    def _tell(self, stage: str, done: int, total: int, begin: float) -> None:
        if self.progress is not None:
            spent = time.perf_counter() - begin
            self.progress(stage, done, total, spent / done * (total - done) if done else None)
