"""Plans: which attention each head of each layer of a model runs, in which phase and pass."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn._arguments import is_integer, is_number
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern
from visattn.plan import hub
from visattn.plan.json_format import (
    MAX_COUNT,
    MAX_PARTS,
    brief,
    check_at_most,
    check_values,
    shown,
)
from visattn.plan.plan_file import MAX_RULES, plan_json, plan_values
from visattn.plan.rule import ANY, PASSES, ROLES, Denoiser, Rule, Table

__all__ = ["Plan"]

MAX_PHASES = 100


@dataclass(frozen=True, eq=True)
class Plan:
    """Which attention each head of a model runs.

    A plan is checked against a model when it is applied. For another geometry its patterns are
    lowered again: fractions in patterns scale with the grid, token counts do not.

    Args:
        rules: the last rule that matches a call decides; a call that matches no rule is dense.
        dense_layers: indices of layers that stay dense, counted from 0, or backwards from -1.
        dense_steps: denoising steps that stay dense, ``(first, last)``: the number of steps at
            either end as an int, or a share of all steps as a float, rounded up. Steps are
            positions in the scheduler's schedule; video-to-video with a strength below 1 runs only
            the end of it.
        phases: boundaries between phases as increasing shares of all steps: ``()`` is one phase,
            ``(0.4,)`` two.
        geometry: the token layout that the plan was made for, or None.
        model: name of the model that the plan was made for.
        denoisers: the denoisers that the plan was made for, by role. A plan with denoisers is
            refused by other models.
        evidence: measurements, as JSON values.
        provenance: how the plan was made, as JSON values.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.

    Example:
        >>> from visattn.patterns import Radial
        >>> from visattn.plan import Plan, Rule
        >>> plan = Plan((Rule(Radial()),), dense_layers=(0, -1), dense_steps=(0.2, 0))
        >>> Plan.from_json(plan.to_json()) == plan
        True
        >>> [plan.phase_at(step, steps=10) for step in (0, 1, 2)]
        [None, None, 0]
    """

    rules: tuple[Rule, ...] = ()
    dense_layers: tuple[int, ...] = ()
    dense_steps: tuple[int | float, int | float] = (0, 0)
    phases: tuple[float, ...] = ()
    geometry: TokenLayout | None = None
    model: str | None = None
    denoisers: Mapping[str, Denoiser] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple) or not all(isinstance(r, Rule) for r in self.rules):
            raise TypeError(f"rules={shown(self.rules)} must be a tuple of Rule")
        check_at_most("rules", len(self.rules), MAX_RULES)
        check_at_most("layers in its rules", len({r.layer for r in self.rules}), MAX_PARTS + 1)
        _check_dense(self.dense_layers, self.dense_steps)
        ends = (0.0, *self.phases, 1.0)
        if not all(map(is_number, ends)) or any(
            not a < b for a, b in itertools.pairwise(ends)
        ):
            raise ValueError(
                f"phases={shown(self.phases)} must be increasing shares of the steps between 0 "
                "and 1"
            )
        if len(self.phases) >= MAX_PHASES:
            raise ValueError(
                f"phases has {len(self.phases)} ends; a plan has at most {MAX_PHASES} phases"
            )
        for rule in self.rules:
            if rule.phase is not None and rule.phase > len(self.phases):
                raise ValueError(
                    f"phase={shown(rule.phase)} of a rule must be below the "
                    f"{len(self.phases) + 1} phases of the plan"
                )
        if self.geometry is not None and not isinstance(self.geometry, TokenLayout):
            raise TypeError(f"geometry={self.geometry!r} must be a TokenLayout or None")
        for role in self.denoisers:
            if role not in ROLES:
                raise ValueError(
                    f"denoisers has the role {shown(role)}; roles are {', '.join(ROLES)}"
                )
        for name in ("evidence", "provenance"):
            check_values(name, getattr(self, name))

    def __hash__(self) -> int:
        return hash((self.rules, self.dense_layers, self.dense_steps, self.phases))

    @functools.cached_property
    def needs_step(self) -> bool:
        """Whether the patterns depend on the denoising step."""
        return self.dense_steps != (0, 0) or any(rule.phase is not None for rule in self.rules)

    @functools.cached_property
    def passes(self) -> tuple[str, ...]:
        """The passes that have rules of their own."""
        return tuple(p for p in PASSES if any(rule.pass_ == p for rule in self.rules))

    def phase_at(self, step: int, steps: int) -> int | None:
        """Return the phase of a denoising step, or None where the step stays dense.

        Args:
            step: index of the step, from 0.
            steps: number of all steps.
        """
        first, last = (
            count if isinstance(count, int) else math.ceil(count * steps - 1e-9)
            for count in self.dense_steps
        )
        if step < first or step >= steps - last:
            return None
        return sum(step >= end * steps - 1e-9 for end in self.phases)

    def fits(self, role: str, denoiser: Denoiser, layers: Sequence[str]) -> None:
        """Check that the plan fits a denoiser.

        Args:
            role: role of the denoiser in its pipeline.
            denoiser: its class and sizes.
            layers: the module paths of its attention layers, in order.

        Raises:
            ValueError: the plan was made for another model.
        """
        made_for = self.denoisers.get(role)
        if made_for is not None and made_for != denoiser:
            raise ValueError(
                f"plan is for another model: its {role} is {made_for}, this one is "
                f"{denoiser}; use a plan searched for this model"
            )
        for number in self.dense_layers:
            if not -len(layers) <= number < len(layers):
                raise ValueError(
                    f"dense_layers holds {number}, and {role} has the {len(layers)} layers 0 to "
                    f"{len(layers) - 1}"
                )
        known = {*layers, ANY}
        for rule in self.rules:
            if rule.role not in (role, ANY):
                continue
            if rule.layer not in known:
                raise ValueError(
                    f"plan is for another model: it names the layer {rule.layer!r}, and the "
                    f"attention layers of {role} are {layers[0]} to {layers[-1]}"
                )
            heads = len(rule.patterns) if isinstance(rule.patterns, tuple) else denoiser.heads
            if heads != denoiser.heads:
                raise ValueError(
                    f"plan is for another model: it gives {heads} heads to layer {rule.layer!r}, "
                    f"and the layers of {role} have {denoiser.heads}"
                )

    def table(self, role: str, number: int, layers: Sequence[str], heads: int) -> Table:
        """Return the patterns of the heads of one layer, by phase and pass.

        Passes are ``"any"`` and those of ``passes``. The table is empty where the layer is always
        dense.

        Args:
            role: role of the denoiser.
            number: index of the layer in ``layers``.
            layers: the module paths of all attention layers, in order.
            heads: the number of heads of the layer.
        """
        if any(number == dense % len(layers) for dense in self.dense_layers):
            return {}
        return self.table_at(role, layers[number], heads)

    def table_at(self, role: str, layer: str, heads: int) -> Table:
        """Return the same table for a layer by its path, without regard to ``dense_layers``.

        Args:
            role: role of the denoiser.
            layer: the module path of the layer.
            heads: the number of heads of the layer.
        """
        dense: tuple[HeadPattern, ...] = (Dense(),) * heads
        phases = range(len(self.phases) + 1)
        out: Table = {(phase, pass_): dense for phase in phases for pass_ in (ANY, *self.passes)}
        groups = {(one, path) for one in (role, ANY) for path in (layer, ANY)}
        matching = [
            (number, when) for group in groups for when, number in self._last.get(group, {}).items()
        ]
        undecided = set(out)
        for number, (phase, pass_) in sorted(matching, reverse=True):
            rule_phases = phases if phase is None else (phase,)
            rule_passes = (ANY, *self.passes) if pass_ == ANY else (pass_,)
            decided = undecided.intersection(itertools.product(rule_phases, rule_passes))
            patterns = self.rules[number].patterns
            for key in decided:
                out[key] = patterns if isinstance(patterns, tuple) else (patterns,) * heads
            undecided -= decided
            if not undecided:
                break
        return {} if all(heads == dense for heads in out.values()) else out

    @functools.cached_property
    def _last(self) -> dict[tuple[str, str], dict[tuple[int | None, str], int]]:
        """The index of the last rule for each role and layer, by phase and pass. Only these rules
        count, so the time for a table does not grow with the number of rules."""
        last: dict[tuple[str, str], dict[tuple[int | None, str], int]] = {}
        for index, rule in enumerate(self.rules):
            last.setdefault((rule.role, rule.layer), {})[rule.phase, rule.pass_] = index
        return last

    def to_json(self) -> str:
        """Return the plan as the text of a plan file.

        Keys are sorted. Each pattern, each rule and each key of ``denoisers``, ``evidence`` and
        ``provenance`` is on a line of its own.

        Raises:
            ValueError: the text is larger than a plan file may be, or a pattern is longer.
        """
        settings = {
            "model": self.model,
            "dense_layers": self.dense_layers,
            "dense_steps": self.dense_steps,
            "phases": self.phases,
            "evidence": dict(self.evidence),
            "provenance": dict(self.provenance),
        }
        return plan_json(self.rules, self.denoisers, self.geometry, settings)

    @classmethod
    def from_json(cls, text: str, what: str = "the plan") -> Plan:
        """Read the text that ``to_json`` wrote.

        Args:
            text: the content of a plan file.
            what: names the plan in errors.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: the text is no JSON or of another schema, or has an unknown key or pattern,
                or a value that no plan may have.
        """
        values = plan_values(text, what)
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: {brief(error)}") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``visattn_plan.json`` into a folder.

        Args:
            folder: path of the folder, which is created if it is missing.

        Raises:
            OSError: the file cannot be written.
        """
        hub.save(self.to_json(), folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Plan:
        """Read a plan from a file, a folder or a repository of the Hugging Face hub.

        Args:
            source: path of a JSON file, of a folder with ``visattn_plan.json``, or a hub id.
            revision: branch, tag or commit of the repository.
            token: access token for the hub.
            local_files_only: read from the hub's cache without network access.

        Raises:
            OSError: there is no such file or repository.
            TypeError: a value of the file has the wrong type.
            ValueError: the file holds no plan.
        """
        path = hub.find(source, revision=revision, token=token, local_files_only=local_files_only)
        return cls.from_json(hub.load(path), f"plan {str(source)!r}")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload plan",
    ) -> str:
        """Upload the plan into a model repository of the hub and return the URL of the commit.

        Args:
            repo_id: id of the repository, which is created if it is missing.
            private: whether a new repository is private; None: the default of the account.
            token: access token for the hub.
            commit_message: message of the commit.
        """
        return hub.push(
            self.to_json(), repo_id, private=private, token=token, commit_message=commit_message
        )


def _check_dense(layers: object, steps: object) -> None:
    if not isinstance(layers, tuple) or not all(
        is_integer(layer) and abs(layer) <= MAX_COUNT for layer in layers
    ):
        raise ValueError(f"dense_layers={shown(layers)} must be layer numbers, as in (0, 1, -1)")
    check_at_most("dense_layers", len(layers), 2 * MAX_PARTS)
    if not isinstance(steps, tuple) or len(steps) != 2 or not all(map(_is_count, steps)):
        raise ValueError(
            f"dense_steps={shown(steps)} must be (first, last): step counts of at least 0, or "
            "shares from 0.0 to 1.0"
        )


def _is_count(value: object) -> bool:
    """Return whether ``value`` is a number of steps, or a share of them."""
    return is_number(value) and 0 <= value <= (1 if isinstance(value, float) else MAX_COUNT)
