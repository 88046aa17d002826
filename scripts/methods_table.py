"""Write docs/methods.md: where each method comes from, what its default is, and how it differs.

    python scripts/methods_table.py

The table is read from the docstrings; the form of their sections is in visattn/sources.py.
"""

from __future__ import annotations

from pathlib import Path

from method_docs.sources import methods_table

from visattn.guidance.method_list import listed_edits, listed_methods
from visattn.patterns import PATTERNS
from visattn.patterns.base.head_pattern import KINDS

TABLE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
HEAD = """# The methods and their sources

Written by `python scripts/methods_table.py` from the docstrings; do not edit.

The default of a method is what its authors' released code computes (**code**), what their paper
says (**paper**: there is no code, or the two differ and the reason stands beside the word), or
neither (**own**). Every difference of the default settings from that is named.

"""


def groups() -> dict[str, list[type | object]]:
    """The methods under the headings of the table."""
    return {
        "Static patterns": list(PATTERNS.values()),
        "Dynamic patterns": [kind for name, kind in KINDS.items() if name not in PATTERNS],
        "Guidance": list(listed_methods()),
        "Edits of attention": list(listed_edits()),
    }


def text() -> str:
    """The whole file."""
    return HEAD + methods_table(groups())


def main() -> None:
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
