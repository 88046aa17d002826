"""First stage: run dense generations, and find their seconds, their steps and their layout."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visattn.attention.lowering import block_sizes
from visattn.geometry.layout import TokenLayout
from visattn.inject import Observation, observe
from visattn.kernels.launch import launch_of
from visattn.search.measure.latency import heads_run_separately
from visattn.search.measure.recorded_attention import spread_steps
from visattn.search.measure.target import SearchTarget
from visattn.search.measure.tile_grid import TileGrid, tile_grids
from visattn.search.request import SearchRequest
from visattn.tasks.runner import Task, TaskResult

__all__ = ["Observed", "observe_dense"]

TIMED_GENERATIONS = 3  # after one that is not timed


@dataclass(frozen=True)
class Observed:
    """Properties of a dense generation.

    Attributes:
        seconds: median seconds of a generation.
        steps: number of denoising steps.
        phases: where one phase ends and the next begins, as in a Plan.
        layout: layout of the tokens.
        runs: how often each layer's attention runs in a generation, by phase and role; each pass
            of a batch counts.
        read_steps: the steps whose attention is read, by role.
        block: tokens of a block.
        grids: the tilings that stencils are tried with.
    """

    seconds: float
    steps: int
    phases: tuple[float, ...]
    layout: TokenLayout
    runs: Mapping[tuple[int, str], int]
    read_steps: Mapping[str, set[int]]
    block: int
    grids: tuple[TileGrid, ...]

    def phase_of(self, step: int) -> int:
        """The phase of a denoising step."""
        return phase_of(step, self.steps, self.phases)

    @property
    def all_read_steps(self) -> set[int]:
        """The steps that are read, of any denoiser."""
        return set().union(*self.read_steps.values())


def observe_dense(request: SearchRequest) -> Observed:
    """Time dense generations; find the layout and how often attention runs.

    Raises:
        ValueError: the layers have different layouts, or the number of steps is not known.
        Unfinished: the generation failed.
    """
    run = _generation(request)
    (result,) = request.runner.do("dense", [Task("dense", "a dense generation", run)], alone=True)
    assert result is not None
    value = result.value
    steps = int(value["steps"])
    layout = TokenLayout.from_tokens(tuple(map(tuple, value["tokens"])))
    runs: dict[tuple[int, str], int] = {}
    for role, step, count in value["runs"]:
        key = phase_of(step, steps, request.phases), role
        runs[key] = runs.get(key, 0) + count
    block = block_tokens(request.target, layout)
    return Observed(
        seconds=statistics.median(value["seconds"]),
        steps=steps,
        phases=request.phases,
        layout=layout,
        runs=runs,
        read_steps={
            role: spread([s for r, s, _ in value["runs"] if r == role], request.settings.steps)
            for role in {role for _, role in runs}
        },
        block=block,
        grids=tuple(tile_grids(layout, block)),
    )


def _generation(request: SearchRequest) -> Any:
    """Return the task's function, which generates the first prompt."""

    def run() -> TaskResult:
        prompt, seed = request.prompts[0]
        runs: dict[tuple[str, int], int] = {}
        layouts: set[TokenLayout] = set()
        steps = 0

        def count(observation: Observation) -> None:
            nonlocal steps
            if observation.steps is None:
                raise ValueError("the number of denoising steps is not known")
            steps = observation.steps
            layouts.add(observation.layout)
            if observation.number == 0:
                passes = len(observation.passes or ("any",))
                key = observation.role, int(observation.step or 0)
                runs[key] = runs.get(key, 0) + passes

        with observe(request.target.pipe, count):
            request.target.generate(prompt, seed)
        if len(layouts) != 1:
            raise ValueError(
                f"a generation has the layouts {sorted(map(str, layouts))}; a search needs one"
            )
        seconds = [request.target.generate(prompt, seed).seconds for _ in range(TIMED_GENERATIONS)]
        return {
            "seconds": seconds,
            "steps": steps,
            "runs": [[role, step, n] for (role, step), n in sorted(runs.items())],
            "tokens": [list(segment) for segment in layouts.pop().tokens],
        }, {}

    return run


def phase_of(step: int, steps: int, phases: Sequence[float]) -> int:
    """Return the phase of a step out of ``steps``."""
    return sum(step >= end * steps - 1e-9 for end in phases)


def spread(steps: Sequence[int], count: int) -> set[int]:
    """Return ``count`` of the steps that a denoiser runs, evenly spread."""
    ordered = sorted(steps)
    return {ordered[n] for n in spread_steps(len(steps), count)}


def block_tokens(target: SearchTarget, layout: TokenLayout) -> int:
    """Return how many tokens a block of the backend has at most."""
    parameter = next(next(iter(target.modules.values())).parameters())
    dtype = parameter.dtype if parameter.dtype.itemsize > 1 else torch.float32
    q = torch.empty(1, 1, 1, 64, dtype=dtype, device=target.device)
    return block_sizes(layout.length)[0] if heads_run_separately(q) else min(launch_of(q)[:2])
