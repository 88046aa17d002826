"""A search at one shape: the pipeline, the arguments of the search, and the task runner."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from visattn._version import versions
from visattn.runtime.processes import ProcessGroup
from visattn.runtime.progress import Progress
from visattn.search.arguments import PromptPair, Settings
from visattn.search.candidate_choice import CandidateChoice
from visattn.search.measure.clip_quality import ClipScorer
from visattn.search.measure.target import SearchTarget
from visattn.tasks.result_store import ResultStore
from visattn.tasks.runner import TaskRunner

__all__ = ["SearchRequest", "runner_of"]

FORMAT = 2  # of the stored results
LIBRARIES = ("torch", "triton", "diffusers", "transformers")  # whose versions results depend on


@dataclass(frozen=True)
class SearchRequest:
    """A search at one shape.

    Args:
        target: the pipeline with the arguments of its call.
        prompts: (prompt, seed) pairs to calibrate on.
        held_out: (prompt, seed) pairs to validate on.
        runner: runs the tasks and stores their results.
        phases: where one phase ends and the next begins, as in a Plan.
        candidates: which candidates are tried.
        settings: how much is measured.
        scorer: judges the content of clips; None: there are no verdicts.
        deadline: ``time.monotonic()`` after which the validation starts no further pair.
    """

    target: SearchTarget
    prompts: Sequence[PromptPair]
    held_out: Sequence[PromptPair]
    runner: TaskRunner
    phases: tuple[float, ...] = ()
    candidates: CandidateChoice = field(default_factory=CandidateChoice)
    settings: Settings = field(default_factory=Settings)
    scorer: ClipScorer | None = None
    deadline: float = math.inf

    @property
    def to_learn(self) -> Sequence[PromptPair]:
        """The pairs from which stencils are learned: the first half."""
        return self.prompts[: max(1, len(self.prompts) // 2)]

    @property
    def to_score(self) -> Sequence[PromptPair]:
        """The pairs on which candidates are scored: the second half, or all if there is one."""
        return self.prompts[max(1, len(self.prompts) // 2) :] or self.prompts

    def at_shape(self, call: Mapping[str, Any]) -> SearchRequest:
        """Return the same search at another shape; its results are kept in the same folder.

        Args:
            call: the arguments of the pipeline's call that differ.
        """
        target = SearchTarget(self.target.pipe, {**self.target.call, **call}, self.target.name)
        runner = self.runner
        other = runner_of(target, runner.store.folder, runner.progress, runner.group)
        return replace(self, target=target, runner=other, deadline=math.inf)


def runner_of(
    target: SearchTarget,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> TaskRunner:
    """Return the runner of a search's tasks.

    Args:
        target: the pipeline with the arguments of its call.
        folder: folder of the stored results; None: they are in memory.
        progress: called after each task.
        group: the processes that share the work.
    """
    about = {
        "versions": versions(LIBRARIES),
        "model": target.fingerprint(),
        "call": target.call,
        "device": kind_of_device(target.device),
        "format": FORMAT,
    }
    return TaskRunner(ResultStore(folder), about, progress, group)


def kind_of_device(device: torch.device) -> str:
    """Return the kind of a device, without its index and its number of threads: several processes
    have different ones, and results do not depend on them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} of {platform.machine()}"
