"""Second stage: read the attention of dense generations, and record calls of the denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from visattn.inject import observe
from visattn.search.arguments import PromptPair
from visattn.search.candidates.learned_stencils import Learner, learned
from visattn.search.measure.output_losses import Layer
from visattn.search.measure.replay import CallRecorder, RecordedCall, Replay
from visattn.search.request import SearchRequest
from visattn.search.stages.observe import Observed
from visattn.tasks.result_store import StoredResult
from visattn.tasks.runner import Task, TaskResult

__all__ = ["Calibrated", "calibrate"]

CALL = "call "  # prefix of the tensors of recorded calls
LEARNER_ROWS = 8  # of each tile


@dataclass(frozen=True)
class Calibrated:
    """Attention and denoiser calls of dense generations.

    Attributes:
        tables: attention mass of each layer by tiling, the mean over phases. A table has the mass
            by tile offset, then by key tile.
        attention: mean attention of one query, ``[H, T, Y, X]`` by layer, for pictures.
        replay: recorded calls of the denoisers.
    """

    tables: Mapping[Layer, list[torch.Tensor]]
    attention: Mapping[Layer, torch.Tensor]
    replay: Replay


def calibrate(request: SearchRequest, observed: Observed) -> Calibrated:
    """Read attention tables of the first prompts, and record denoiser calls to replay.

    Raises:
        Unfinished: all generations failed.
    """
    tasks = [_task(request, observed, pair) for pair in request.to_learn]
    results = [result for result in request.runner.do("learn", tasks) if result is not None]
    for result in results:
        for text in result.value["failures"]:
            request.runner.failures[f"learn: {text}"] = "left out"
    tables = learned(results, observed.phase_of)
    calls = [
        call
        for result in results
        for call in CallRecorder.read(_recorded(result), request.target.device)
    ]
    count = len(calls) // max(1, len(calls) // max(1, request.settings.replays))
    return Calibrated(
        tables={
            (role, number): _mean_over_phases(tables, role, number) for _, role, number in tables
        },
        attention=_mean_attention(results),
        replay=Replay(request.target.pipe, [calls[n] for n in whole_steps(calls, count)]),
    )


def _task(request: SearchRequest, observed: Observed, pair: PromptPair) -> Task:
    prompt, seed = pair
    target, settings, steps = request.target, request.settings, observed.all_read_steps

    def run() -> TaskResult:
        learner = Learner(steps, observed.block, 2 * settings.tiles, LEARNER_ROWS)
        recorder = CallRecorder(target.pipe, steps, target.call.get("true_cfg_scale"))
        with observe(target.pipe, learner), recorder.listening():
            target.generate(prompt, seed)
        (value, tensors), (calls, call_tensors) = learner.item(), recorder.item()
        named = {f"{CALL}{name}": x for name, x in call_tensors.items()}
        return {**value, **calls}, tensors | named

    question = {"prompt": prompt, "seed": seed, "steps": sorted(steps), "tiles": settings.tiles}
    return Task(question, f"{prompt!r}, seed {seed}", run)


def _recorded(result: StoredResult) -> StoredResult:
    """Return the recorded calls of a result alone."""
    tensors = {
        name.removeprefix(CALL): x for name, x in result.tensors.items() if name.startswith(CALL)
    }
    return StoredResult(result.value, tensors)


def _mean_over_phases(
    tables: Mapping[tuple[int, str, int], list[torch.Tensor]], role: str, number: int
) -> list[torch.Tensor]:
    by_phase = [value for (_, r, n), value in tables.items() if (r, n) == (role, number)]
    return [torch.stack(list(phases)).mean(0) for phases in zip(*by_phase, strict=True)]


def _mean_attention(results: Sequence[StoredResult]) -> dict[Layer, torch.Tensor]:
    """Return the mean attention of one query over generations, ``[H, T, Y, X]`` by layer."""
    maps: dict[Layer, list[torch.Tensor]] = {}
    for result in results:
        for index, (role, number) in enumerate(result.value["attended"]):
            maps.setdefault((role, number), []).append(result.tensors["attention"][index])
    return {layer: torch.stack(generations).mean(0) for layer, generations in maps.items()}


def whole_steps(calls: Sequence[RecordedCall], count: int) -> list[int]:
    """Choose about ``count`` calls: whole steps, spread over generations and steps.

    Of the first generation one step is taken, of the second another, and so on.

    Returns:
        Indices into ``calls``.
    """
    steps: list[list[int]] = []
    for index, call in enumerate(calls):
        last = calls[steps[-1][-1]] if steps else None
        same = last is not None and (last.role, last.step) == (call.role, call.step)
        if same and call.name not in {calls[n].name for n in steps[-1]}:
            steps[-1].append(index)
        else:
            steps.append([index])
    calls_per_step = len(steps[0])
    wanted = max(1, min(len(steps), count // calls_per_step))
    chosen = [steps[(2 * n + 1) * len(steps) // (2 * wanted)] for n in range(wanted)]
    return [index for step in chosen for index in step]
