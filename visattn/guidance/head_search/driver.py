"""``search_heads``: which heads are worth perturbing, found greedily in rounds (HeadHunter of
"Where and How to Perturb", Ahn et al. 2025, arXiv 2506.10978)."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from visattn._arguments import check_count
from visattn._version import __version__, versions
from visattn.guidance.guiders.soft_pag import Policy, SoftPAG
from visattn.guidance.head_search.batched_trials import Generating
from visattn.guidance.head_search.head_candidates import (
    Candidate,
    heads_of,
    plans_of,
    read_call,
    read_candidates,
    read_kept,
    read_pairs,
)
from visattn.guidance.head_search.head_log import HeadLog, Place
from visattn.guidance.head_search.objectives import Objective, name_of
from visattn.guidance.head_set import HeadSet
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import describe
from visattn.inject.models.fingerprint import fingerprint
from visattn.inject.models.searchable import check_searchable
from visattn.plan.json_format import shown
from visattn.runtime.processes import ProcessGroup, join
from visattn.runtime.progress import Progress

__all__ = ["search_heads"]

logger = logging.getLogger("visattn")


def search_heads(
    pipe: Any,
    objective: Objective,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    k: int = 1,
    rounds: int = 1,
    strength: float = 1.0,
    scale: float = 3.0,
    policy: Policy = "all",
    target: str = "value",
    candidates: HeadSet | Mapping[int | str, object] | None = None,
    batch: int = 1,
    call: Mapping[str, Any] | None = None,
    keep: HeadSet | Mapping[int | str, object] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeadSet:
    """Find the heads whose perturbation makes a pipeline's frames better.

    In every round each head that is left is tried: every prompt is generated with every seed, by
    ``SoftPAG`` of the heads that were found so far and this one. The ``k`` heads with the largest
    mean objective are added (of equal ones, those of lower layers and numbers). A search takes
    about ``rounds * candidates * prompts * seeds`` generations.

    Args:
        pipe: a diffusers pipeline of a known family; with a plan or without.
        objective: of frames, float32 ``[T, H, W, 3]`` in [0, 1] on the CPU, and their prompt: a
            number, larger for better ones.
        prompts, seeds: every prompt is generated with every seed, the same for all heads.
        k: heads that a round adds; rounds: how many there are. The paper's for general quality are
            24 and 1 with 20 prompts, for a style 3 and 5 with 5 seeds.
        strength, scale, policy, target: of SoftPAG; the set that is found has them too.
        candidates: heads that are tried, by layer as of SoftPAG; None: all heads of all layers of
            self-attention or joint attention.
        batch: how many heads are tried as samples of one call of the pipeline. Each has the noise
            that it would have alone; the frames are the same up to rounding. Where memory runs out
            it is halved.
        call: arguments of the pipeline's call, such as ``num_inference_steps``.
        keep: heads that are perturbed from the start and are part of the result, by layer as of
            SoftPAG, at their strengths times ``strength``.
        resume: a file of scores, which are added to it as they are found; a search with the same
            settings goes on from it, also with more rounds or another ``k``. None: no file. Of the
            processes of ``torchrun``, which share the generations, the first one writes it.
        progress: called as ``progress(stage, done, total, seconds_left)`` after each generation;
            ``visattn.runtime.progress.ProgressBar()`` shows a bar.

    Returns:
        The heads. ``provenance`` has the rounds, the mean objective without and with the heads, and
        the candidates that failed: one whose objective raises an exception or is no finite number,
        or for which memory runs out, is left out of the search from then on, which a warning tells
        at the end; where none is left, there are fewer heads. To try such a one again, delete its
        line in the file.

    Raises:
        TypeError, ValueError: an argument is wrong; the pipeline has a cache, is edited or is
            parallel; ``resume`` is of other settings; the objective fails without any of the
            candidates; all candidates fail.
        OSError: the file cannot be read or written.

    Source:
        Ahn et al. (2025), "Where and How to Perturb", arXiv
        2506.10978. Code: github.com/cvlab-kaist/HeadHunter (commit 3828d1c).
    Default:
        code.
    Differences:
        - Candidates that fail are left out, and the search goes on.
    """
    if not callable(objective):
        raise TypeError(
            f"objective={shown(objective)} must be a function of frames [T, H, W, 3] and their "
            "prompt that gives a number"
        )
    for name, count in (("k", k), ("rounds", rounds), ("batch", batch)):
        check_count(name, count, 1)
    pairs = read_pairs(prompts, seeds)
    SoftPAG(None, strength, scale, policy=policy, target=target)  # type: ignore[arg-type]
    if not strength or not scale:
        raise ValueError(
            f"strength={strength!r} and scale={scale!r} must not be 0, which perturbs nothing"
        )
    heads = heads_of(pipe)
    check_searchable(pipe)
    made = Generating(pipe, read_call(pipe, call), heads, strength, scale, policy, target)
    kept = read_kept(keep, heads)
    tried = read_candidates(candidates, heads, kept)
    if len(tried) < k * rounds:
        raise ValueError(
            f"k={k} heads in each of rounds={rounds} are more than the {len(tried)} candidates"
        )
    settings = {
        "versions": versions(("torch", "diffusers", "transformers")),
        "pipeline": type(pipe).__name__,
        "whole pipeline": fingerprint(pipe),
        "dtype": str(getattr(pipe, "dtype", None)),
        "scheduler": _scheduler(pipe),
        "plan": plans_of(pipe),
        "objective": name_of(objective),
        "pairs": [list(pair) for pair in pairs],
        "call": made.call,
        "strength": strength,
        "scale": scale,
        "policy": policy,
        "target": target,
    }
    with join("a search for heads") as group:
        group.check_same(settings, "model, call or other setting")
        with closing(HeadLog(resume if group.own.first else None, settings)) as log:
            log.found = group.of_first(log.found)
            own = _Search(made, objective, pairs, batch, log, progress, group)
            found = own.run(kept, tried, k, rounds)
    if own.failures:
        logger.warning(
            "search_heads left out %d of %d candidates: %s",
            len(own.failures),
            len(tried),
            "; ".join(f"{row['item']}: {row['error']}" for row in own.failures),
        )
    _, (model, family) = next(iter(known_denoisers(pipe).items()))
    kind = describe(model, family)
    return HeadSet(
        found,
        model=kind.kind,
        size=(kind.layers, kind.heads),
        strength=float(strength),
        scale=float(scale),
        policy=policy,
        target=target,
        objective=name_of(objective),
        provenance={
            "kind": "searched",
            "k": k,
            "rounds": own.rounds,
            "score": {"without": own.before, "with": own.after},
            "candidates": len(tried),
            "failures": own.failures,
            "pairs": settings["pairs"],
            "call": made.call,
            "fingerprint": settings["whole pipeline"],
            "visattn": __version__,
        },
    )


class _Search:
    """A search: scores of sets of heads, from the log or from generations."""

    def __init__(
        self,
        made: Generating,
        objective: Objective,
        pairs: Sequence[tuple[str, int]],
        batch: int,
        log: HeadLog,
        progress: Progress | None,
        group: ProcessGroup,
    ) -> None:
        self.group = group
        self.made, self.objective, self.pairs, self.log = made, objective, pairs, log
        self.batch = self.most = batch  # `most` is what memory has room for
        self.rounds: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.before: float | None = None
        self.after: float | None = None
        self.clock = _Clock(progress, group.own.world)

    def run(
        self,
        kept: Mapping[str, Mapping[int, float]],
        candidates: Sequence[Candidate],
        k: int,
        rounds: int,
    ) -> dict[str, dict[int, float]]:
        """The heads that are found, with those that are kept."""
        chosen = {path: dict(own) for path, own in kept.items()}
        left, clock, each = list(candidates), self.clock, len(self.pairs)
        last = 0 if k == 1 else 1  # the set of the last round, which is scored already if k is 1
        clock.plan(each * (1 + last + sum(len(left) - k * n for n in range(rounds))))
        before = self._alone(chosen, 0)
        if isinstance(before, str):
            raise ValueError(
                f"objective {name_of(self.objective)} fails with none of the candidates perturbed: "
                f"{before}"
            )
        self.before = before
        for number in range(1, rounds + 1):
            clock.stage = f"round {number} of {rounds}"
            scores = self._round(chosen, left, number)
            left = sorted(scores, key=lambda own: (-scores[own], own))
            if not left and self.rounds:
                break
            if not left:
                raise ValueError(
                    f"all of the {len(candidates)} candidates failed; the last one: "
                    f"{self.failures[-1]['error']}"
                )
            self.rounds.append(_summary(left[:k], scores))
            for own in left[:k]:
                chosen.setdefault(own.path, {})[own.head] = 1.0
            left = sorted(left[k:])
            rest = [max(0, len(left) - k * n) for n in range(rounds - number)]
            clock.plan(each * (last + sum(rest)))
        self.after = self.rounds[-1]["added"][0][2]
        if k > 1:
            clock.stage = "the set"
            after = self._alone(chosen, rounds)
            self.after = None if isinstance(after, str) else after
            if isinstance(after, str):
                self.failures.append({"item": "the set", "round": rounds, "error": after})
        return chosen

    def _alone(self, chosen: Mapping[str, Mapping[int, float]], number: int) -> float | str:
        """The mean objective of a set, or why there is none."""
        places = [Place(self.log.name_of(chosen), None, None, n) for n in range(len(self.pairs))]
        scores = []
        for start in range(0, len(places), self.group.own.world):
            turn = places[start : start + self.group.own.world]
            new = self._fill([_Work(place.pair, [place], [chosen]) for place in turn], number)
            for place in turn:
                value = new.get(place, self.log.get(place))
                assert value is not None
                if isinstance(value, str):
                    return f"prompt {self.pairs[place.pair][0]!r}: {value}"
                scores.append(value)
                self.clock.tell(1)
        return math.fsum(scores) / len(scores)

    def _round(
        self,
        chosen: Mapping[str, Mapping[int, float]],
        left: Sequence[Candidate],
        number: int,
    ) -> dict[Candidate, float]:
        """The mean objective of every candidate that does not fail."""
        among = self.log.name_of(chosen)
        scores: dict[Candidate, float] = {}
        turn = self.batch * self.group.own.world
        for start in range(0, len(left), turn):
            alive = left[start : start + turn]
            starts = range(start, start + len(alive), self.batch)
            parts = [left[at : at + self.batch] for at in starts]
            found: dict[Candidate, list[float]] = {own: [] for own in alive}
            for pair in range(len(self.pairs)):
                works = []
                for part in parts:
                    tried = [own for own in part if own in alive]
                    places = [Place(among, own.path, own.head, pair) for own in tried]
                    works.append(_Work(pair, places, [_with(chosen, own) for own in tried]))
                self._fill(works, number)
                for own in alive:
                    value = self.log.get(Place(among, own.path, own.head, pair))
                    assert value is not None
                    if isinstance(value, str):
                        item = f"{own.path}:{own.head}"
                        self.failures.append({"item": item, "round": number, "error": value})
                        self.clock.tell(len(self.pairs) - pair)
                    else:
                        found[own].append(value)
                        self.clock.tell(1)
                alive = [own for own in alive if len(found[own]) == pair + 1]
            scores |= {own: math.fsum(found[own]) / len(self.pairs) for own in alive}
        return scores

    def _fill(self, works: Sequence[_Work], number: int) -> dict[Place, float | str]:
        """See that the log has the values of some works, one for each process at most, and give
        those that it had not. Where one of a work is missing, all are generated as they were the
        first time, so that they are the same to the bit. The log of the first process has the file;
        a failure without a candidate is not kept."""
        new: dict[Place, float | str] = {}
        for own in works[self.group.own.rank :][:1]:
            if all(self.log.get(place) is not None for place in own.places):
                continue
            self.clock.begin()
            for place, value in zip(own.places, self._values(own.sets, own.pair), strict=True):
                if self.log.get(place) is None:
                    new[place] = value
                    self._keep(place, value, number)
            self.clock.ran(len(own.sets))
        for found in self.group.gather(new):
            for place, value in found.items():
                new[place] = value
                self._keep(place, value, number)
        return new

    def _keep(self, place: Place, value: float | str, number: int) -> None:
        if self.log.get(place) is None and not (place.layer is None and isinstance(value, str)):
            self.log.put(place, value, number)

    def _values(
        self, sets: Sequence[Mapping[str, Mapping[int, float]]], pair: int
    ) -> Iterator[float | str]:
        """The objective of a pair with each of some sets, or why there is none."""
        prompt, seed = self.pairs[pair]
        done = 0
        while done < len(sets):
            now = sets[done : done + self.most]
            frames = self._frames(now, prompt, seed)
            if isinstance(frames, str):
                if len(now) == 1:
                    yield frames
                    done += 1
                self.most = max(1, len(now) // 2)
                continue
            for own in frames:
                yield self._judge(own, prompt)
            done += len(now)

    def _frames(
        self, sets: Sequence[Mapping[str, Mapping[int, float]]], prompt: str, seed: int
    ) -> list[torch.Tensor] | str:
        """Frames with each set, or that memory has run out."""
        try:
            return self.made.frames(sets, prompt, seed)
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            said = _words(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"out of memory: {said}"

    def _judge(self, frames: torch.Tensor, prompt: str) -> float | str:
        if not bool(torch.isfinite(frames).all()):
            return "the frames are not finite"
        try:
            value = float(self.objective(frames, prompt))
        except Exception as error:  # it is the caller's code
            return f"{type(error).__name__}: {_words(error)}"
        return value if math.isfinite(value) else f"the objective is {value}"


class _Work(NamedTuple):
    """Sets of heads that one process generates for a pair, and the places of their scores."""

    pair: int
    places: Sequence[Place]
    sets: Sequence[Mapping[str, Mapping[int, float]]]


@dataclass
class _Clock:
    """Tells what is done, and how long the rest will take ``world`` processes."""

    progress: Progress | None
    world: int
    stage: str = "without the heads"
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    runs: int = 0
    started: float = 0.0

    def plan(self, rest: int) -> None:
        """So many generations are still to do."""
        self.total = self.done + rest

    def begin(self) -> None:
        """Generations begin that are timed."""
        self.started = time.perf_counter()

    def ran(self, count: int) -> None:
        """So many generations were timed."""
        self.seconds += time.perf_counter() - self.started
        self.runs += count

    def tell(self, count: int) -> None:
        """So many more generations need not be done any more."""
        self.done += count
        if self.progress is not None:
            rest = self.total - self.done
            left = self.seconds / self.runs * rest / self.world if self.runs else None
            self.progress(self.stage, self.done, self.total, left)


def _summary(added: Sequence[Candidate], scores: Mapping[Candidate, float]) -> dict[str, Any]:
    """A round for the record."""
    values = list(scores.values())
    return {
        "added": [[own.path, own.head, scores[own]] for own in added],
        "candidates": len(values),
        "mean": math.fsum(values) / len(values),
        "least": min(values),
    }


def _with(
    chosen: Mapping[str, Mapping[int, float]], own: Candidate
) -> dict[str, dict[int, float]]:
    out = {path: dict(heads) for path, heads in chosen.items()}
    out.setdefault(own.path, {})[own.head] = 1.0
    return out


def _is_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; devices have no class of it in common."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__


def _scheduler(pipe: Any) -> str:
    """A pipeline's scheduler and its configuration."""
    own = getattr(pipe, "scheduler", None)
    config = {k: v for k, v in getattr(own, "config", {}).items() if not k.startswith("_")}
    return f"{type(own).__name__} {sorted(config.items())}"
