"""Trying and timing launch settings, and the loop that does it within a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from measured.candidates import (
    Settings,
    backward_candidates,
    committed,
    distance,
    fields,
    forward_candidates,
)
from measured.gradients import check_gradients
from measured.running import Budget, Send, reason
from visattn.attention.backends.triton_kernels import triton_attention, triton_backward
from visattn.attention.spec import AttentionSpec
from visattn.bench import SHAPES, Scattered, WrongResult
from visattn.bench.measure_attention import check
from visattn.bench.timing import Time, take_turns
from visattn.geometry.layout import TokenLayout
from visattn.kernels.targets import BackwardLaunch, Launch
from visattn.patterns import Neighborhood, Pattern, Radial

__all__ = ["MAPS", "Bench", "Job", "identity", "jobs_of", "try_maps", "tune"]

# Maps that stand for use: full blocks alone, mostly partial ones, and a rule of its own.
MAPS: dict[str, Pattern] = {
    "full": Scattered(0.25, block=256),
    "partial": Neighborhood((0.5, 0.5, 0.4)),
    "radial": Radial(0.2),
}
CALLS = 4  # that are timed as one, so that launching them is hidden behind their work
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Record = dict[str, Any]
Reasons = dict[str, str | None]


class Job(NamedTuple):
    """Settings of the ``forward`` or ``backward`` kernels to be measured, in an order of rank."""

    kind: str
    dtype: str
    head_size: int
    settings: tuple[int, ...]
    rank: int

    @property
    def launch(self) -> Settings:
        return (Launch if self.kind == "forward" else BackwardLaunch)(*self.settings)


def jobs_of(
    target: str, kinds: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int]
) -> list[Job]:
    """All candidates; those that differ least from the committed ones come first, of every kind,
    so that a run that ends early has looked around each entry."""
    jobs = []
    for kind in kinds:
        listed = forward_candidates if kind == "forward" else backward_candidates
        for dtype in dtypes:
            for size in sizes:
                place = (target, size, DTYPES[dtype].itemsize)
                own = committed(kind, *place)
                for launch in listed(*place):
                    rank = distance(launch, own)
                    jobs.append(Job(kind, dtype, size, fields(launch), rank))
    return sorted(jobs, key=lambda job: job.rank)


def identity(job: Job | Record) -> tuple[Any, ...]:
    """What tells a job, or the record of one, from others."""
    own = job._asdict() if isinstance(job, Job) else job
    return own["kind"], own["dtype"], own["head_size"], tuple(own["settings"])


@dataclass(frozen=True)
class Bench:
    """What all candidates are measured on: a shape of ``visattn.bench`` with so many heads."""

    target: str
    shape: str
    heads: int
    device: str = "cuda"
    repeats: int = 5

    @property
    def layout(self) -> TokenLayout:
        return SHAPES[self.shape].layout

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a bench lives as long as its process
    def tensors(self, dtype: str, head_size: int) -> tuple[torch.Tensor, ...]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        size = (1, self.heads, self.layout.length, head_size)
        return tuple(
            torch.randn(size, generator=generator).to(self.device, DTYPES[dtype]) for _ in range(4)
        )

    def spec(self, job: Job, pattern: Pattern) -> AttentionSpec:
        """One pattern on all heads."""
        return AttentionSpec((pattern,) * self.heads, self.layout, scale=job.head_size**-0.5)

    def attend(
        self, job: Job, pattern: Pattern, launch: Launch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE."""
        q, k, v, _ = self.tensors(job.dtype, job.head_size)
        return triton_attention(q, k, v, self.spec(job, pattern), settings=launch)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def forward_of(
        self, dtype: str, head_size: int, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What gradients begin with: output and LSE by the committed settings, checked."""
        job = Job("forward", dtype, head_size, (), 0)
        own = committed("forward", self.target, head_size, DTYPES[dtype].itemsize)
        assert isinstance(own, Launch)
        out, lse = self.attend(job, MAPS[name], own)
        check(out, *self.tensors(dtype, head_size)[:3], MAPS[name], self.layout)
        return out, lse

    def run_of(self, job: Job, name: str, launch: Settings) -> Callable[[], Any]:
        """A call of the kernels of a job's kind."""
        pattern = MAPS[name]
        if isinstance(launch, Launch):
            return functools.partial(self.attend, job, pattern, launch)
        q, k, v, grad_out = self.tensors(job.dtype, job.head_size)
        out, lse = self.forward_of(job.dtype, job.head_size, name)
        blocks = (launch.block_q, launch.block_k)
        settings = (blocks, (launch.queries, launch.masked), launch.warps, launch.stages)
        spec = self.spec(job, pattern)
        return lambda: triton_backward(q, k, v, out, lse, grad_out, None, spec, settings=settings)

    def try_out(self, job: Job, name: str) -> None:
        """Compile a candidate and run it once."""
        self.run_of(job, name, job.launch)()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, job: Job, name: str) -> Record:
        """Check a candidate, then time it and the committed settings in turn; seconds of a call,
        and ``ratio``, the one over the other, turn by turn.

        Raises:
            WrongResult: it is wrong.
        """
        qkv = self.tensors(job.dtype, job.head_size)[:3]
        run = self.run_of(job, name, job.launch)
        pattern = MAPS[name]
        if job.kind == "forward":
            check(run()[0], *qkv, pattern, self.layout)
        else:
            out, lse = self.forward_of(job.dtype, job.head_size, name)
            grad_out = self.tensors(job.dtype, job.head_size)[3]
            check_gradients(run(), qkv, out, lse, grad_out, pattern, self.layout)
        own = committed(job.kind, self.target, job.head_size, DTYPES[job.dtype].itemsize)
        turns = [_several(run), _several(self.run_of(job, name, own))]
        times = take_turns(turns, self.repeats, torch.device(self.device))
        ratio = Time.of([a / b for a, b in zip(*(x.samples for x in times), strict=True)])
        return {
            "seconds": times[0].median / CALLS,
            "samples": [round(x / CALLS, 8) for x in times[0].samples],
            "committed_seconds": times[1].median / CALLS,
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }


def _several(run: Callable[[], Any]) -> Callable[[], None]:
    def runs() -> None:
        for _ in range(CALLS):
            run()

    return runs


def try_maps(send: Send, bench: Bench, job: Job) -> None:
    """Try a candidate on each map, and send its name and what went wrong, or None. In a process of
    its own, it leaves the compiled kernels where the process that times them finds them."""
    for name in MAPS:
        try:
            bench.try_out(job, name)
            send((name, None))
        except Exception as error:  # whatever compilers and drivers raise: it is recorded
            send((name, reason(error)))


def tune(
    jobs: Sequence[Job],
    records: list[Record],
    budget: Budget,
    *,
    try_out: Callable[[list[Job]], list[Reasons]],
    measure: Callable[[Job, str], Record],
    keep: Callable[[], None],
    width: int,
) -> int:
    """Measure the jobs that have no record yet, while there is time; returns how many are left.

    Args:
        records: grows; ``keep`` is called after each candidate.
        try_out: compiles and runs candidates, for each map None or why it does not; ``width``
            of them at a time.
    """
    known = {identity(record) for record in records}
    waiting = [job for job in jobs if identity(job) not in known]
    longest = 0.0  # of a round
    while waiting and budget.left > longest:
        begin = budget.spent
        batch = waiting[:width]
        for job, reasons in zip(batch, try_out(batch), strict=True):
            if budget.left <= 0:
                return len(waiting)
            maps = {}
            for name, why in reasons.items():
                maps[name] = {"skipped": why} if why else _measured(job, name, measure)
            records.append(
                {
                    "kind": job.kind,
                    "dtype": job.dtype,
                    "head_size": job.head_size,
                    "settings": list(job.settings),
                    "maps": maps,
                }
            )
            keep()
            waiting.remove(job)
            budget.say(f"{job.kind} {job.dtype} {job.head_size} {words(job.launch)}: {told(maps)}")
        longest = max(longest, budget.spent - begin)
    return len(waiting)


def _measured(job: Job, name: str, measure: Callable[[Job, str], Record]) -> Record:
    try:
        return measure(job, name)
    except WrongResult as error:
        return {"wrong": str(error)}
    except Exception as error:
        if "CUDA error" in str(error):  # nothing runs in this process any more
            raise
        return {"skipped": reason(error)}


def words(settings: Settings) -> str:
    """As it is written in ``kernels/targets.py``."""
    return f"{type(settings).__name__}({', '.join(map(str, fields(settings)))})"


def told(maps: dict[str, Record]) -> str:
    """The times of a candidate, in a line."""
    parts = []
    for name, row in maps.items():
        if "ratio" in row:
            parts.append(f"{name} {1e3 * row['seconds']:.2f} ms ({row['ratio']:.2f})")
        else:
            parts.append(f"{name} {'wrong' if 'wrong' in row else row['skipped'][:60]}")
    return ", ".join(parts)
