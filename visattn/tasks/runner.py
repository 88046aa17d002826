"""The tasks of a search: the processes of ``torchrun`` share them, and each result is stored."""

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
    """All tasks of a stage failed; the message has the first reason."""


class Task(NamedTuple):
    """A piece of work.

    Attributes:
        question: what the result answers, as JSON values.
        label: for people.
        run: computes the result.
    """

    question: Any
    label: str
    run: Callable[[], TaskResult]


class TaskRunner:
    """Runs tasks in one process, or splits them over the processes of a group.

    Processes that share a folder without a group start at different tasks and leave out tasks that
    another one has stored. Two may run the same task at the same time, which only wastes time.

    Args:
        store: for the results.
        about: what all questions depend on, as JSON values: model, shape, versions.
        progress: is called after each task.
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
        # What is timed also depends on the threads of the process that times it.
        self.threads: int = self.group.of_first(torch.get_num_threads())
        self.group.check_same(about, "model, call, kind of device or version")

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
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
        """Return the results in the order of the tasks; None for a task that failed. A stored
        result is not computed again, unless it is a failure.

        Args:
            stage: the kind of the tasks.
            tasks: the tasks.
            alone: whether the first process runs all tasks, because others would disturb a timing.
            timed: whether results are times, which depend on the number of threads; ``alone``
                implies it.
            needed: whether the search ends if all tasks fail.

        Raises:
            Unfinished: all failed.
        """
        begin = time.perf_counter()
        of_time = [self.threads] if alone or timed else []
        keys = [key_of(stage, [self.about, task.question, *of_time]) for task in tasks]
        rank = 0 if alone else self.group.process.rank
        world = 1 if alone else self.world
        assigned = [n for n in range(len(tasks)) if n % world == rank]
        assigned = assigned if not alone or self.first else []
        open_ = [n for n in assigned if self._stored(keys[n]) is None]
        if self.world == 1 and open_ and self.store.folder is not None:
            start = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % len(open_)
            open_ = open_[start:] + open_[:start]  # another search may use the folder
        for done, number in enumerate(open_):
            self._report(stage, done, len(open_), begin)
            task = tasks[number]
            if self._stored(keys[number]) is not None:  # by another process
                continue
            try:
                value, tensors = task.run()
            except Exception as error:  # of any library; the other tasks still run
                text = " ".join(str(error).split())[:300] or type(error).__name__
                value, tensors = {"failed": f"{type(error).__name__}: {text}"}, {}
            if self._stored(keys[number]) is None:  # otherwise all use what was stored first
                self.store.put(keys[number], value, tensors)
        if open_:
            self._report(stage, len(open_), len(open_), begin)
        self.group.wait()
        # a result that one process cannot read is used by none, so that all use the same
        unread = self.group.gather([key for key in keys if self.store.get(key) is None])
        lost = set[str]().union(*unread)
        results: list[StoredResult | None] = []
        for key, task in zip(keys, tasks, strict=True):
            item = None if key in lost else self.store.get(key)
            if item is None or "failed" in item.value:
                why = "a process could not read it" if item is None else item.value["failed"]
                self.failures[f"{stage}: {task.label}"] = why
                item = None
            results.append(item)
        if needed and tasks and not any(item is not None for item in results):
            first = next(iter(self.failures.values()))
            raise Unfinished(f"{stage} failed for all of {len(tasks)}: {first}")
        self.store.forget()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        return results

    def broadcast(self, value: bool) -> bool:
        """Return the value of the first process."""
        return bool(self.group.of_first(value))

    def _stored(self, key: str) -> StoredResult | None:
        item = self.store.get(key)
        return None if item is None or "failed" in item.value else item

    def _report(self, stage: str, done: int, total: int, begin: float) -> None:
        if self.progress is not None:
            spent = time.perf_counter() - begin
            self.progress(stage, done, total, spent / done * (total - done) if done else None)
