"""The JSON form of a plan: its schema, its strict reader and its writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visattn._arguments import is_integer
from visattn._version import __version__
from visattn.geometry.layout import TokenLayout
from visattn.patterns import HeadPattern, parse_pattern
from visattn.plan.json_format import (
    MAX_BYTES,
    Json,
    Record,
    brief,
    check_at_most,
    json_by_lines,
    parse_json,
    shown,
)
from visattn.plan.rule import ANY, Denoiser, Rule
from visattn.plan.schema_1 import upgraded

__all__ = ["FORMER", "MAX_RULES", "MAX_TOKENS", "SCHEMA", "plan_json", "plan_values"]

SCHEMA = "visattn.plan/2"
FORMER = "visattn.plan/1"  # its patterns lack later options, which then have their old values
MAX_PATTERN = 200_000  # characters of a pattern: a stencil of about ten thousand offsets
MAX_PATTERNS, MAX_RULES = 1 << 14, 1 << 16  # of a plan
MAX_TOKENS = 1 << 22  # of a geometry that is read from a file
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


def plan_json(
    rules: Sequence[Rule],
    denoisers: Mapping[str, Denoiser],
    geometry: TokenLayout | None,
    settings: Json,
) -> str:
    """Return the JSON text of a plan.

    Args:
        rules: of the plan, in order.
        denoisers: the denoisers that the plan was made for, by role.
        geometry: the layout that the plan was made for.
        settings: the other fields of the plan, by name.

    Raises:
        ValueError: the text is larger than a plan file may be, or a pattern is longer.
    """
    patterns = list(dict.fromkeys(p for rule in rules for p in rule.heads))
    check_at_most("patterns", len(patterns), MAX_PATTERNS)
    for pattern in patterns:
        if len(repr(pattern)) > MAX_PATTERN:
            raise ValueError(
                f"pattern {shown(repr(pattern))} is {len(repr(pattern))} characters long; a "
                f"plan file holds at most {MAX_PATTERN} of each"
            )
    indices = {pattern: index for index, pattern in enumerate(patterns)}
    value: Json = settings | {
        "schema": SCHEMA,
        "visattn": __version__,
        "denoisers": {
            role: {"class": d.kind, "layers": d.layers, "heads": d.heads}
            for role, d in denoisers.items()
        },
        "geometry": None if geometry is None else geometry.tokens,
        "patterns": [repr(pattern) for pattern in patterns],
        "rules": [_rule_json(rule, indices) for rule in rules],
    }
    text = json_by_lines(value, ("denoisers", "patterns", "rules", "evidence", "provenance"))
    check_at_most("bytes as JSON", len(text), MAX_BYTES)
    return text


def plan_values(text: str, what: str) -> dict[str, Any]:
    """Read the JSON text of a plan.

    Args:
        text: the content of a plan file.
        what: names the plan in errors.

    Returns:
        The arguments of ``Plan``, by name.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: the text is no JSON or of another schema, or has an unknown key or pattern.
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
            count = len(record.sequence(key))
            raise ValueError(f"{what} has {count} {key}; at most {most} are allowed")
    patterns = [_pattern(item, f"patterns of {what}") for item in record.sequence("patterns")]
    if schema == FORMER:
        patterns = [upgraded(pattern) for pattern in patterns]
    rules = [
        _rule(item, f"rule {index} of {what}", patterns)
        for index, item in enumerate(record.sequence("rules"))
    ]
    geometry = record.value.get("geometry")
    return {
        "rules": tuple(rules),
        "dense_layers": tuple(record.sequence("dense_layers")),
        "dense_steps": _dense_steps(record),
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


def _rule_json(rule: Rule, indices: Mapping[HeadPattern, int]) -> Json:
    """A rule as JSON, which names patterns by their index."""
    value: Json = {"layer": rule.layer, "role": rule.role, "pass": rule.pass_}
    value = {key: word for key, word in value.items() if word != ANY}
    if rule.phase is not None:
        value["phase"] = rule.phase
    if isinstance(rule.patterns, tuple):
        value["heads"] = [indices[pattern] for pattern in rule.patterns]
    else:
        value["pattern"] = indices[rule.patterns]
    return value


def _pattern(text: object, where: str) -> HeadPattern:
    if not isinstance(text, str):
        raise ValueError(f"{where} hold {shown(text)}; a pattern is a string")
    try:
        return parse_pattern(text, MAX_PATTERN)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {brief(error)}") from None


def _rule(value: object, what: str, patterns: Sequence[HeadPattern]) -> Rule:
    record = Record(value, what, ("layer", "role", "pass", "phase", "heads", "pattern"))

    def pattern(index: object) -> HeadPattern:
        if not is_integer(index):
            raise ValueError(f"{what} names the pattern {shown(index)}; it must be a number")
        if not 0 <= index < len(patterns):
            raise ValueError(
                f"{what} names pattern {shown(index)}, and the plan has {len(patterns)} patterns"
            )
        return patterns[index]

    if ("heads" in record.value) == ("pattern" in record.value):
        raise ValueError(f"{what} must have one of the keys 'heads' and 'pattern'")
    chosen: HeadPattern | tuple[HeadPattern, ...]
    if "pattern" in record.value:
        chosen = pattern(record.value["pattern"])
    else:
        chosen = tuple(pattern(index) for index in record.sequence("heads"))
    try:
        return Rule(
            chosen,
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


def _dense_steps(record: Record) -> tuple[int | float, int | float]:
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
