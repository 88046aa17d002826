"""What a method says of its source: the sections Source, Default and Differences of its docstring.

::

    Source:
        Authors (year), "Title", arXiv 1234.56789, eq. N. Code: github.com/owner/repo (commit
        abcdef0).
    Default:
        code. At most one sentence why.
    Differences:
        - One line for each.

The default is ``code`` (what the authors' released code computes), ``paper`` (what the paper says,
where the two differ or there is no code) or ``own`` (neither). Differences are those of the default
settings from that; ``none`` where there are none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["DEFAULTS", "MethodSource", "methods_table", "read_source"]

DEFAULTS = ("code", "paper", "own")
SECTIONS = ("Source", "Default", "Differences")
CODE = re.compile(r"Code: github\.com/[\w.-]+/[\w.-]+ \(commit [0-9a-f]{7,40}\)")
PUBLICATION = re.compile(r'\((?:19|20)\d\d\), "[^"]+"')


@dataclass(frozen=True)
class MethodSource:
    """Source of a method.

    Attributes:
        name: of the class or function.
        source: the publication and the code.
        default: one of ``DEFAULTS``; why: the sentence behind it, or empty.
        differences: one for each line; empty for none.
    """

    name: str
    source: str
    default: str
    why: str
    differences: tuple[str, ...]


def read_source(method: type | object) -> MethodSource:
    """What the docstring of a class or a function says of its source.

    Raises:
        ValueError: a section is missing or not in the right form.
    """
    name = str(getattr(method, "__name__", method))
    sections = _sections(inspect.cleandoc(method.__doc__ or ""))
    for section in SECTIONS:
        if not sections.get(section):
            raise ValueError(f"the docstring of {name} has no section {section}:")
    source = _joined(sections["Source"])
    default, why = _default(name, _joined(sections["Default"]))
    if default != "own" and not PUBLICATION.search(source):
        raise ValueError(
            f'Source of {name} must name its publication as \'Authors (year), "Title"\': {source!r}'
        )
    if default == "code" and not CODE.search(source):
        raise ValueError(
            f"Source of {name} must name its code as 'Code: github.com/owner/repo (commit "
            f"abcdef0)', as its default is code: {source!r}"
        )
    return MethodSource(name, source, default, why, _items(name, sections["Differences"]))


def _sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a docstring."""
    found: dict[str, list[str]] = {}
    own: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and line.strip():
            own.append(line.strip())
        elif line.strip():
            own = found.setdefault(line.removesuffix(":"), []) if line.endswith(":") else []
    return found


def _joined(lines: list[str]) -> str:
    return " ".join(lines)


def _default(name: str, text: str) -> tuple[str, str]:
    """The word and the sentence after it."""
    word, _, why = text.partition(" ")
    word = word.rstrip(".,:")
    if word not in DEFAULTS:
        raise ValueError(
            f"Default of {name} must begin with one of {', '.join(DEFAULTS)}: {text!r}"
        )
    return word, why


def _items(name: str, lines: list[str]) -> tuple[str, ...]:
    """The items of a list, each begun by ``- `` and perhaps longer than a line."""
    if _joined(lines).rstrip(".") == "none":
        return ()
    items: list[list[str]] = []
    for line in lines:
        if line.startswith("- "):
            items.append([line[2:]])
        elif items:
            items[-1].append(line)
        else:
            raise ValueError(f"Differences of {name} must be 'none' or begin with '- ': {line!r}")
    return tuple(_joined(item) for item in items)


def methods_table(groups: Mapping[str, Iterable[type | object]]) -> str:
    """The sources of all methods in Markdown: a heading and a table for each group."""
    parts = []
    for title, methods in groups.items():
        rows = ["| method | source | default | differences |", "|---|---|---|---|"]
        for own in map(read_source, methods):
            default = f"**{own.default}** {own.why}".strip()
            cells = (f"`{own.name}`", own.source, default, "<br>".join(own.differences) or "none")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join((f"## {title}", "", *rows)))
    return "\n\n".join(parts) + "\n"
