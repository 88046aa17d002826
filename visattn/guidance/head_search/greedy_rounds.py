"""The rounds of a search for heads: each adds the candidates with the best scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from visattn.guidance.head_search.batched_trials import HeadStrengths
from visattn.guidance.head_search.head_candidates import Candidate
from visattn.guidance.head_search.head_log import Place
from visattn.guidance.head_search.objectives import name_of
from visattn.guidance.head_search.set_scores import SetScores, Trial

__all__ = ["GreedyRounds"]


class GreedyRounds:
    """A greedy search for heads.

    Args:
        scores: scores sets of heads.

    Attributes:
        rounds: what each round added, and the scores, as JSON values.
        failures: the candidates that failed, as JSON values.
        before: mean objective without the heads.
        after: mean objective with the heads; None means not known.
    """

    def __init__(self, scores: SetScores) -> None:
        self.scores, self.progress = scores, scores.progress
        self.rounds: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.before: float | None = None
        self.after: float | None = None

    def run(
        self, kept: HeadStrengths, candidates: Sequence[Candidate], k: int, num_rounds: int
    ) -> dict[str, dict[int, float]]:
        """Search.

        Args:
            kept: heads that are perturbed from the start.
            candidates: heads to try.
            k: heads that a round adds.
            num_rounds: number of rounds.

        Returns:
            The heads that were found, and the kept ones.

        Raises:
            ValueError: the objective fails without any candidate, or all candidates fail.
        """
        chosen = {path: dict(heads) for path, heads in kept.items()}
        left, num_pairs = list(candidates), len(self.scores.pairs)
        # with k=1 the score of the last round is that of the result
        num_last = 0 if k == 1 else 1
        num_trials = sum(len(left) - k * index for index in range(num_rounds))
        self.progress.plan(num_pairs * (1 + num_last + num_trials))
        before = self._mean_of_set(chosen, 0)
        if isinstance(before, str):
            raise ValueError(
                f"objective {name_of(self.scores.objective)} fails without any candidate: {before}"
            )
        self.before = before
        for number in range(1, num_rounds + 1):
            self.progress.stage = f"round {number} of {num_rounds}"
            means = self._mean_by_candidate(chosen, left, number)
            left = sorted(means, key=lambda candidate: (-means[candidate], candidate))
            if not left and self.rounds:
                break
            if not left:
                raise ValueError(
                    f"all {len(candidates)} candidates failed; the last error: "
                    f"{self.failures[-1]['error']}"
                )
            self.rounds.append(_summary(left[:k], means))
            for candidate in left[:k]:
                chosen.setdefault(candidate.path, {})[candidate.head] = 1.0
            left = sorted(left[k:])
            num_trials = sum(max(0, len(left) - k * index) for index in range(num_rounds - number))
            self.progress.plan(num_pairs * (num_last + num_trials))
        self.after = self.rounds[-1]["added"][0][2]
        if k > 1:
            self.progress.stage = "the set"
            after = self._mean_of_set(chosen, num_rounds)
            self.after = None if isinstance(after, str) else after
            if isinstance(after, str):
                self.failures.append({"item": "the set", "round": num_rounds, "error": after})
        return chosen

    def _mean_of_set(self, chosen: HeadStrengths, number: int) -> float | str:
        """Return the mean objective of a set, or an error."""
        name, pairs = self.scores.log.name_of(chosen), self.scores.pairs
        places = [Place(name, None, None, pair) for pair in range(len(pairs))]
        values = []
        for start in range(0, len(places), self.scores.num_processes):
            together = places[start : start + self.scores.num_processes]
            computed = self.scores.compute(
                [Trial(place.pair, [place], [chosen]) for place in together], number
            )
            for place in together:
                value = computed.get(place, self.scores.log.get(place))
                assert value is not None
                if isinstance(value, str):
                    return f"prompt {pairs[place.pair][0]!r}: {value}"
                values.append(value)
                self.progress.advance(1)
        return math.fsum(values) / len(values)

    def _mean_by_candidate(
        self, chosen: HeadStrengths, left: Sequence[Candidate], number: int
    ) -> dict[Candidate, float]:
        """Return the mean objective of every candidate that does not fail."""
        means: dict[Candidate, float] = {}
        num_together = self.scores.batch * self.scores.num_processes
        for start in range(0, len(left), num_together):
            means |= self._means_together(chosen, left[start : start + num_together], number)
        return means

    def _means_together(
        self, chosen: HeadStrengths, candidates: Sequence[Candidate], number: int
    ) -> dict[Candidate, float]:
        """Return the means of candidates that the processes try at the same time, one batch each.
        A candidate that fails is not tried with further prompts."""
        name, batch = self.scores.log.name_of(chosen), self.scores.batch
        num_pairs = len(self.scores.pairs)
        batches = [candidates[i : i + batch] for i in range(0, len(candidates), batch)]
        alive = list(candidates)
        values: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
        for pair in range(num_pairs):
            trials = []
            for candidates_of_batch in batches:
                tried = [candidate for candidate in candidates_of_batch if candidate in alive]
                places = [Place(name, each.path, each.head, pair) for each in tried]
                trials.append(Trial(pair, places, [_added(chosen, each) for each in tried]))
            self.scores.compute(trials, number)
            for candidate in alive:
                value = self.scores.log.get(Place(name, candidate.path, candidate.head, pair))
                assert value is not None
                if isinstance(value, str):
                    item = f"{candidate.path}:{candidate.head}"
                    self.failures.append({"item": item, "round": number, "error": value})
                    self.progress.advance(num_pairs - pair)
                else:
                    values[candidate].append(value)
                    self.progress.advance(1)
            alive = [candidate for candidate in alive if len(values[candidate]) == pair + 1]
        return {candidate: math.fsum(values[candidate]) / num_pairs for candidate in alive}


def _summary(added: Sequence[Candidate], means: Mapping[Candidate, float]) -> dict[str, Any]:
    """Return what a round added, and its scores, as JSON values."""
    return {
        "added": [[candidate.path, candidate.head, means[candidate]] for candidate in added],
        "candidates": len(means),
        "mean": math.fsum(means.values()) / len(means),
        "least": min(means.values()),
    }


def _added(chosen: HeadStrengths, candidate: Candidate) -> dict[str, dict[int, float]]:
    """Return a set of heads with one more head."""
    heads_by_path = {path: dict(heads) for path, heads in chosen.items()}
    heads_by_path.setdefault(candidate.path, {})[candidate.head] = 1.0
    return heads_by_path
