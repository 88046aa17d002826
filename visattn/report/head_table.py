"""The map of heads as tables that stand without a script, and the data of what needs one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visattn.report.colors import Family, families_of
from visattn.report.markup import Html, figure, joined, put

__all__ = ["family_styles", "head_data", "heads_html"]

PATTERN = 240  # characters that the page shows of a pattern; the plan has it whole
KEYS = ("role", "layer", "number", "head", "phase", "family", "density", "executed", "error",
        "seconds", "reason", "stability")
SWITCH = put("""<fieldset class="switch" id="ways" hidden><legend>Colour by</legend>
<label><input type="radio" name="way" value="family" checked> pattern</label>
<label><input type="radio" name="way" value="density"> density</label>
<label><input type="radio" name="way" value="error"> error</label>
<label><input type="radio" name="way" value="stability"> stability</label></fieldset>""")

Heads = Sequence[Mapping[str, Any]]


def family_styles(heads: Heads) -> str:
    """The style sheet of the families of these heads."""
    rule = ".f{}{{background:{};color:{}}}"
    return "".join(rule.format(at, x.color, x.ink) for at, x in enumerate(_families(heads)))


def head_data(heads: Heads) -> list[dict[str, Any]]:
    """What the page knows of each head, with long patterns cut."""
    return [{**{key: head.get(key) for key in KEYS}, "pattern": _cut(head)} for head in heads]


def _cut(head: Mapping[str, Any]) -> str:
    text = str(head.get("pattern") or "")
    more = len(text) - PATTERN
    return text if more <= 0 else f"{text[:PATTERN]} … and {more} characters more, in the plan"


def _family(head: Mapping[str, Any]) -> str:
    return str(head.get("family") or "unknown")


def _families(heads: Heads) -> list[Family]:
    return families_of(map(_family, heads))


def _columns(heads: Heads) -> int:
    return 1 + max(int(head["head"]) for head in heads)


def heads_html(heads: Heads) -> Html:
    """A switch of colours and their legend, a panel for each role and phase, room for detail."""
    families = {family.name: (at, family) for at, family in enumerate(_families(heads))}
    panels: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for index, head in enumerate(heads):
        key = (str(head.get("role") or ""), int(head.get("phase") or 0))
        panels.setdefault(key, []).append((index, head))
    phases = len({phase for _, phase in panels}) > 1
    legend = joined(
        put('<li><i class="f{}">{}</i> {} <small>{}</small></li>', at, family.letters, name,
            sum(_family(head) == name for head in heads))
        for name, (at, family) in families.items()
    )
    return put(
        '<div class="aside">{}<ul class="legend" id="families">{}</ul>'
        '<div class="scale" id="scale" hidden></div></div>'
        '<div class="heads {}"><div class="map">{}</div>'
        '<div class="detail" id="detail" role="region" aria-label="Selected head" hidden></div>'
        "</div>",
        SWITCH,
        legend,
        next(size for most, size in ((8, "large"), (24, "medium"), (1e9, "small"))
             if _columns(heads) <= most),
        joined(
            _panel(f"{role}, phase {phase}" if phases else role, own, families)
            for (role, phase), own in sorted(panels.items())
        ),
    )


def _panel(
    name: str,
    heads: Sequence[tuple[int, Mapping[str, Any]]],
    families: Mapping[str, tuple[int, Family]],
) -> Html:
    rows: dict[int, dict[int, Html]] = {}
    paths: dict[int, object] = {}
    for index, head in heads:
        at, family = families[_family(head)]
        number, column = int(head["number"]), int(head["head"])
        rows.setdefault(number, {})[column] = put(
            '<td class="f{}" data-i="{}" title="layer {}, head {}: {}, density {}, error {}">{}',
            at, index, number, column, family.name, figure(head.get("density")),
            figure(head.get("error")), family.letters,
        )
        paths[number] = head.get("layer")
    columns = range(_columns([head for _, head in heads]))
    lines = joined(
        put('<tr><th scope="row" title="{}"{}>{}</th>{}</tr>', paths[number],
            _minor(number, len(rows)), number,
            joined(cells.get(column, Html("<td>")) for column in columns))
        for number, cells in sorted(rows.items())
    )
    return put(
        '<div class="panel"><table><caption>{}</caption><thead><tr><td>layer</td>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>",
        name,
        joined(put('<th scope="col"{}>{}', _minor(at, len(columns)), at) for at in columns),
        lines,
    )


def _minor(number: int, of: int) -> Html | None:
    """Of many layers or heads only each fifth shows its number."""
    return Html(' class="minor"') if of > 16 and number % 5 else None
