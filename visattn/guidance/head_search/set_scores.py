"""Scores of sets of heads, read from the log of the search or computed from generated frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from visattn.guidance.head_search.batched_trials import BatchedTrials, HeadStrengths
from visattn.guidance.head_search.head_log import HeadLog, Place
from visattn.guidance.head_search.objectives import Objective
from visattn.guidance.head_search.search_progress import SearchProgress
from visattn.runtime.processes import ProcessGroup

__all__ = ["SetScores", "Trial"]


class Trial(NamedTuple):
    """Sets of heads that one process generates together, for one prompt and seed.

    Attributes:
        pair: index of the prompt and seed.
        places: where the log keeps the score of each set.
        sets: the sets of heads.
    """

    pair: int
    places: Sequence[Place]
    sets: Sequence[HeadStrengths]


class SetScores:
    """Scores of sets of heads. They are read from the log; missing ones are computed and logged.

    Args:
        trials: generates frames with several sets of heads.
        objective: scores frames and their prompt.
        pairs: prompts with their seeds.
        batch: sets that are generated in one call of the pipeline.
        log: has the scores.
        group: the processes that share the generations.
        progress: times the generations.
    """

    def __init__(
        self,
        trials: BatchedTrials,
        objective: Objective,
        pairs: Sequence[tuple[str, int]],
        batch: int,
        log: HeadLog,
        group: ProcessGroup,
        progress: SearchProgress,
    ) -> None:
        self.trials, self.objective, self.pairs, self.log = trials, objective, pairs, log
        self.group, self.progress = group, progress
        self.batch = batch
        self._max_batch = batch  # what memory has room for

    @property
    def num_processes(self) -> int:
        return self.group.process.world

    def compute(self, trials: Sequence[Trial], round_number: int) -> dict[Place, float | str]:
        """Add the missing scores of some trials to the log.

        If one score of a trial is missing, all sets of the trial are generated, as the first time.
        So the scores are bit-identical. Only the first process writes the file. A failure without a
        candidate is not logged.

        Args:
            trials: at most one for each process.
            round_number: the round of the search.

        Returns:
            The scores and errors that were missing, of all processes.
        """
        computed: dict[Place, float | str] = {}
        for trial in trials[self.group.process.rank :][:1]:
            if all(self.log.get(place) is not None for place in trial.places):
                continue
            self.progress.start_timing()
            values = self._values(trial.sets, trial.pair)
            for place, value in zip(trial.places, values, strict=True):
                if self.log.get(place) is None:
                    computed[place] = value
                    self._keep(place, value, round_number)
            self.progress.stop_timing(len(trial.sets))
        for of_process in self.group.gather(computed):
            for place, value in of_process.items():
                computed[place] = value
                self._keep(place, value, round_number)
        return computed

    def _keep(self, place: Place, value: float | str, round_number: int) -> None:
        if self.log.get(place) is None and not (place.layer is None and isinstance(value, str)):
            self.log.put(place, value, round_number)

    def _values(self, sets: Sequence[HeadStrengths], pair: int) -> Iterator[float | str]:
        """Yield the score of each set for a prompt and seed, or an error. The batch is halved when
        memory runs out."""
        prompt, seed = self.pairs[pair]
        done = 0
        while done < len(sets):
            batch = sets[done : done + self._max_batch]
            frames = self._frames(batch, prompt, seed)
            if isinstance(frames, str):
                if len(batch) == 1:
                    yield frames
                    done += 1
                self._max_batch = max(1, len(batch) // 2)
                continue
            for frames_of_set in frames:
                yield self._score(frames_of_set, prompt)
            done += len(batch)

    def _frames(
        self, sets: Sequence[HeadStrengths], prompt: str, seed: int
    ) -> list[torch.Tensor] | str:
        """Return frames with each set, or an error when memory ran out."""
        try:
            return self.trials.frames(sets, prompt, seed)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            message = _brief(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"out of memory: {message}"

    def _score(self, frames: torch.Tensor, prompt: str) -> float | str:
        if not bool(torch.isfinite(frames).all()):
            return "the frames are not finite"
        try:
            value = float(self.objective(frames, prompt))
        except Exception as error:  # it is the caller's code
            return f"{type(error).__name__}: {_brief(error)}"
        return value if math.isfinite(value) else f"the objective is {value}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. Devices share no class of this error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__
