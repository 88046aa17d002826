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
from visattn._version import __version__
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, parse_pattern
from visattn.plan import hub as store
from visattn.plan.json_format import (
    MAX_BYTES,
    MAX_COUNT,
    MAX_PARTS,
    Json,
    Record,
    brief,
    check_values,
    parse_json,
    shown,
)
from visattn.plan.schema_1 import former
from visattn.plan.writing import written

__all__ = ["ANY", "PASSES", "ROLES", "SCHEMA", "Denoiser", "Plan", "Rule"]

SCHEMA = "visattn.plan/2"
FORMER = "visattn.plan/1"  # options of patterns that such a file lacks have their values of then
MAX_PATTERN = 200_000  # characters of a pattern: a stencil of some ten thousand offsets
MAX_PHASES = 100
MAX_PATTERNS, MAX_RULES = 1 << 14, 1 << 16  # of a plan
MAX_TOKENS = 1 << 22  # of a geometry that is read from a file
ANY = "any"
PASSES = ("cond", "uncond", "perturbed")
ROLES = ("transformer", "transformer_2", "unet")
KEYS = (
    "schema",
    "visattn",
    "model",
    "denoisers",
    "geometry",
    "dense_layers",
    "dense_steps",
    "phases",
    "patterns",
    "rules",
    "evidence",
    "provenance",
)
# what the heads of a layer run, by (phase, pass); the pass may be "any"
Table = dict[tuple[int, str], tuple[HeadPattern, ...]]


@dataclass(frozen=True)
class Rule:
    """What some heads run; the last rule that fits a call decides.

    Args:
        patterns: one pattern for all heads, or one per head.
        layer: path of the attention module in the denoiser, ``"blocks.3.attn1"``, or ``"any"``.
        role: ``"transformer"``, ``"transformer_2"``, ``"unet"`` or ``"any"``.
        phase: number of the plan's phase, or None for all.
        pass_: ``"cond"``, ``"uncond"``, ``"perturbed"`` or ``"any"``.

    Raises:
        TypeError, ValueError: an argument is something else.
    """

    patterns: HeadPattern | tuple[HeadPattern, ...]
    layer: str = ANY
    role: str = ANY
    phase: int | None = None
    pass_: str = ANY

    def __post_init__(self) -> None:
        if not self.heads or not all(isinstance(item, HeadPattern) for item in self.heads):
            raise TypeError(
                f"patterns={shown(self.patterns)} of a rule must be a pattern, or a tuple of one "
                "per head"
            )
        if len(self.heads) > MAX_PARTS:
            raise ValueError(
                f"a rule has patterns for {len(self.heads)} heads; at most {MAX_PARTS} are allowed"
            )
        if not isinstance(self.layer, str) or not self.layer:
            raise TypeError(f"layer={shown(self.layer)} of a rule must be a module path or 'any'")
        if self.role not in (*ROLES, ANY):
            raise ValueError(f"role={shown(self.role)} must be one of {', '.join((*ROLES, ANY))}")
        if self.pass_ not in (*PASSES, ANY):
            raise ValueError(f"pass={shown(self.pass_)} must be one of {', '.join((*PASSES, ANY))}")
        if self.phase is not None and (not is_integer(self.phase) or self.phase < 0):
            raise ValueError(f"phase={shown(self.phase)} of a rule must be None or at least 0")

    @property
    def heads(self) -> tuple[HeadPattern, ...]:
        """The pattern of all heads, or that of each."""
        return self.patterns if isinstance(self.patterns, tuple) else (self.patterns,)


@dataclass(frozen=True)
class Denoiser:
    """A denoiser that a plan was made for: class name, attention layers, heads of a layer."""

    kind: str
    layers: int
    heads: int

    def __str__(self) -> str:
        return f"{self.kind} with {self.layers} layers of {self.heads} heads"


@dataclass(frozen=True, eq=True)
class Plan:
    """Which attention a model runs.

    Args:
        rules: the last one that fits a call decides; a call that none fits is dense.
        dense_layers: layers that stay dense, by their number in the denoiser from 0, or from -1
            backwards.
        dense_steps: denoising steps that stay dense, ``(first, last)``: how many at either end, an
            int, or a float as a share of all steps, rounded up. Steps are places in the scheduler's
            schedule, of which video-to-video with a strength below 1 runs only the end.
        phases: where one phase ends and the next begins, as shares of all steps, increasing:
            ``()`` is one phase, ``(0.4,)`` two.
        geometry: the token layout that the plan was made at; None: it was made for none.
        model: name of the model that it was made for.
        denoisers: by role, what the model was; a plan that names them fits no other.
        evidence, provenance: what was measured, and how the plan came to be; JSON values.

    A plan is checked against a model when it is applied. At another geometry it is lowered anew:
    fractions in patterns follow the grid, token counts do not.

    Raises:
        TypeError, ValueError: an argument is wrong; the sentence names it.
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
        _check_number("rules", len(self.rules), MAX_RULES)
        _check_number("layers in its rules", len({r.layer for r in self.rules}), MAX_PARTS + 1)
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
        """Whether what runs depends on the denoising step."""
        return self.dense_steps != (0, 0) or any(rule.phase is not None for rule in self.rules)

    @functools.cached_property
    def passes(self) -> tuple[str, ...]:
        """The passes that rules tell apart."""
        return tuple(p for p in PASSES if any(rule.pass_ == p for rule in self.rules))

    def phase_at(self, step: int, steps: int) -> int | None:
        """The phase of a step of ``steps``, or None where the step stays dense."""
        first, last = (
            count if isinstance(count, int) else math.ceil(count * steps - 1e-9)
            for count in self.dense_steps
        )
        if step < first or step >= steps - last:
            return None
        return sum(step >= end * steps - 1e-9 for end in self.phases)

    def fits(self, role: str, denoiser: Denoiser, layers: Sequence[str]) -> None:
        """Raise ValueError, in one sentence, when the plan is for another model than this one.

        Args:
            role: of the denoiser in its pipeline.
            denoiser: what it is; layers: the paths of its attention layers, in order.
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
        """What the heads of one layer run, by phase and pass (``"any"`` and those that rules tell
        apart); empty where the layer is dense throughout.

        Args:
            role: of the denoiser; number: of the layer among ``layers``; heads: of the layer.
        """
        if any(number == dense % len(layers) for dense in self.dense_layers):
            return {}
        return self.table_at(role, layers[number], heads)

    def table_at(self, role: str, layer: str, heads: int) -> Table:
        """The same of a layer by its path, without ``dense_layers``."""
        dense: tuple[HeadPattern, ...] = (Dense(),) * heads
        phases = range(len(self.phases) + 1)
        out: Table = {(phase, pass_): dense for phase in phases for pass_ in (ANY, *self.passes)}
        groups = {(own, path) for own in (role, ANY) for path in (layer, ANY)}
        fitting = [
            (number, when) for own in groups for when, number in self._last.get(own, {}).items()
        ]
        left = set(out)
        for number, (phase, pass_) in sorted(fitting, reverse=True):
            at = phases if phase is None else (phase,)
            passes = (ANY, *self.passes) if pass_ == ANY else (pass_,)
            decided = left.intersection((one, other) for one in at for other in passes)
            own = self.rules[number].patterns
            for key in decided:
                out[key] = own if isinstance(own, tuple) else (own,) * heads
            left -= decided
            if not left:
                break
        return {} if all(heads == dense for heads in out.values()) else out

    @functools.cached_property
    def _last(self) -> dict[tuple[str, str], dict[tuple[int | None, str], int]]:
        """The number of the last rule for each role and layer, by phase and pass: no other counts,
        so that a table takes no longer for more rules."""
        found: dict[tuple[str, str], dict[tuple[int | None, str], int]] = {}
        for number, rule in enumerate(self.rules):
            found.setdefault((rule.role, rule.layer), {})[rule.phase, rule.pass_] = number
        return found

    def to_json(self) -> str:
        """The plan as a file holds it: sorted keys; a pattern, a rule, and a key of denoisers,
        evidence and provenance on a line.

        Raises:
            ValueError: it is larger than a plan file may be, or a pattern is longer.
        """
        patterns = list(dict.fromkeys(p for rule in self.rules for p in rule.heads))
        _check_number("patterns", len(patterns), MAX_PATTERNS)
        for pattern in patterns:
            if len(repr(pattern)) > MAX_PATTERN:
                raise ValueError(
                    f"pattern {shown(repr(pattern))} is {len(repr(pattern))} characters long; a "
                    f"plan file holds at most {MAX_PATTERN} of each"
                )
        number = {pattern: index for index, pattern in enumerate(patterns)}
        rules: list[Json] = []
        for rule in self.rules:
            own: Json = {"layer": rule.layer, "role": rule.role, "pass": rule.pass_}
            own = {key: value for key, value in own.items() if value != ANY}
            if rule.phase is not None:
                own["phase"] = rule.phase
            if isinstance(rule.patterns, tuple):
                own["heads"] = [number[pattern] for pattern in rule.patterns]
            else:
                own["pattern"] = number[rule.patterns]
            rules.append(own)
        value: Json = {
            "schema": SCHEMA,
            "visattn": __version__,
            "model": self.model,
            "denoisers": {
                role: {"class": d.kind, "layers": d.layers, "heads": d.heads}
                for role, d in self.denoisers.items()
            },
            "geometry": None if self.geometry is None else self.geometry.tokens,
            "dense_layers": self.dense_layers,
            "dense_steps": self.dense_steps,
            "phases": self.phases,
            "patterns": [repr(pattern) for pattern in patterns],
            "rules": rules,
            "evidence": dict(self.evidence),
            "provenance": dict(self.provenance),
        }
        text = written(value, ("denoisers", "patterns", "rules", "evidence", "provenance"))
        _check_number("bytes as JSON", len(text), MAX_BYTES)
        return text

    @classmethod
    def from_json(cls, text: str, what: str = "the plan") -> Plan:
        """Read what ``to_json`` wrote; ``what`` names it in errors.

        Raises:
            TypeError, ValueError: it is no JSON, of another schema, has an unknown key or pattern,
                or a value that no plan may have.
        """
        value = parse_json(text, what)
        schema = value.get("schema")
        if schema not in (SCHEMA, FORMER):
            raise ValueError(
                f"{what} has the schema {shown(schema)}; this version of visattn reads {SCHEMA!r} "
                f"and {FORMER!r}"
            )
        record = Record(value, what, KEYS)
        record.text("visattn")
        for key, most in (("patterns", MAX_PATTERNS), ("rules", MAX_RULES)):
            if len(record.sequence(key)) > most:
                many = len(record.sequence(key))
                raise ValueError(f"{what} has {many} {key}; at most {most} are allowed")
        patterns = [_pattern(item, f"patterns of {what}") for item in record.sequence("patterns")]
        if schema == FORMER:
            patterns = [former(pattern) for pattern in patterns]
        rules = [
            _rule(item, f"rule {number} of {what}", patterns)
            for number, item in enumerate(record.sequence("rules"))
        ]
        geometry = record.value.get("geometry")
        values: dict[str, Any] = {
            "rules": tuple(rules),
            "dense_layers": tuple(record.sequence("dense_layers")),
            "dense_steps": _pair(record),
            "phases": tuple(record.sequence("phases")),
            "geometry": None if geometry is None else _geometry(record),
            "model": record.text("model"),
            "denoisers": {
                role: _denoiser(item, f"denoiser {shown(role)} of {what}")
                for role, item in record.mapping("denoisers").items()
            },
            "evidence": record.mapping("evidence"),
            "provenance": record.mapping("provenance"),
        }
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: {brief(error)}") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``visattn_plan.json`` into a folder, which is made when it is missing.

        Raises:
            OSError: it cannot be written.
        """
        store.save(self.to_json(), folder)

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
            revision, token, local_files_only: as diffusers takes them, for the hub.

        Raises:
            OSError: there is no such file or repository.
            TypeError, ValueError: the file holds no plan.
        """
        path = store.find(
            source, revision=revision, token=token, local_files_only=local_files_only
        )
        return cls.from_json(store.load(path), f"plan {str(source)!r}")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload plan",
    ) -> str:
        """Upload the plan into a model repository of the hub, made when it is missing; its
        address."""
        return store.push(
            self.to_json(), repo_id, private=private, token=token, commit_message=commit_message
        )


def _check_number(what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"plan has {number} {what}; at most {most} are allowed")


def _check_dense(layers: object, steps: object) -> None:
    if not isinstance(layers, tuple) or not all(
        is_integer(layer) and abs(layer) <= MAX_COUNT for layer in layers
    ):
        raise ValueError(f"dense_layers={shown(layers)} must be layer numbers, as in (0, 1, -1)")
    _check_number("dense_layers", len(layers), 2 * MAX_PARTS)
    if not isinstance(steps, tuple) or len(steps) != 2 or not all(map(_is_count, steps)):
        raise ValueError(
            f"dense_steps={shown(steps)} must be (first, last): step counts of at least 0, or "
            "shares from 0.0 to 1.0"
        )


def _is_count(value: object) -> bool:
    """Whether ``value`` is a number of steps, or a share of them."""
    return is_number(value) and 0 <= value <= (1 if isinstance(value, float) else MAX_COUNT)


def _pattern(text: object, where: str) -> HeadPattern:
    if not isinstance(text, str):
        raise ValueError(f"{where} hold {shown(text)}; a pattern is a string")
    try:
        return parse_pattern(text, MAX_PATTERN)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {brief(error)}") from None


def _rule(value: object, what: str, patterns: Sequence[HeadPattern]) -> Rule:
    record = Record(value, what, ("layer", "role", "pass", "phase", "heads", "pattern"))

    def pattern(number: object) -> HeadPattern:
        if not is_integer(number):
            raise ValueError(f"{what} names the pattern {shown(number)}; it must be a number")
        if not 0 <= number < len(patterns):
            raise ValueError(
                f"{what} names pattern {shown(number)}, and the plan has {len(patterns)} patterns"
            )
        return patterns[number]

    if ("heads" in record.value) == ("pattern" in record.value):
        raise ValueError(f"{what} must have one of the keys 'heads' and 'pattern'")
    own: HeadPattern | tuple[HeadPattern, ...]
    if "pattern" in record.value:
        own = pattern(record.value["pattern"])
    else:
        own = tuple(pattern(number) for number in record.sequence("heads"))
    try:
        return Rule(
            own,
            layer=record.text("layer", ANY) or "",
            role=record.text("role", ANY) or "",
            phase=record.value.get("phase"),
            pass_=record.text("pass", ANY) or "",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {brief(error)}") from None


def _denoiser(value: object, what: str) -> Denoiser:
    record = Record(value, what, ("class", "layers", "heads"))
    return Denoiser(record.needed_text("class"), record.count("layers"), record.count("heads"))


def _pair(record: Record) -> tuple[int | float, int | float]:
    steps = record.sequence("dense_steps") or [0, 0]
    if len(steps) != 2:
        raise record.wrong("dense_steps", "a list of two, first and last")
    return steps[0], steps[1]


def _geometry(record: Record) -> TokenLayout:
    segments = record.sequence("geometry")
    if not all(isinstance(item, list) and item for item in segments):
        raise record.wrong("geometry", 'a list of segments, as in [["grid", 21, 30, 52]]')
    try:
        layout = TokenLayout.from_tokens(tuple(tuple(item) for item in segments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"geometry of {record.what}: {brief(error)}") from None
    if layout.length > MAX_TOKENS:
        raise ValueError(
            f"geometry of {record.what} has {shown(layout.length)} tokens; at most {MAX_TOKENS} "
            "are allowed"
        )
    return layout
