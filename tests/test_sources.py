"""The reader of the sections Source, Default and Differences."""

from __future__ import annotations

import pytest

from visattn.sources import methods_table, read_source

SOURCE = 'Ann et al. (2025), "A title", arXiv 2501.00001. Code: github.com/a/b (commit abcdef0).'


def method(source: str = SOURCE, default: str = "code", differences: str = "none") -> type:
    """A class whose docstring has the three sections."""
    doc = f"""One line.

    Args:
        x: a number.

    Source:
        {source}
    Default:
        {default}
    Differences:
        {differences}

    More text.
    """
    return type("Method", (), {"__doc__": doc})


def test_sections_are_read() -> None:
    own = read_source(
        method(default="code. It is\n        the faster.", differences="- one | a\n        b\n"
               "        - two")
    )
    assert own.name == "Method"
    assert own.source == SOURCE
    assert (own.default, own.why) == ("code", "It is the faster.")
    assert own.differences == ("one | a b", "two")
    assert read_source(method(differences="none.")).differences == ()
    assert read_source(method(source="This project.", default="own")).default == "own"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (type("Bare", (), {}), "Bare has no section Source"),
        (method(differences=""), "Method has no section Differences"),
        (method(default="ours"), "must begin with one of code, paper, own"),
        (method(source=SOURCE.partition(" Code")[0]), "must name its code"),
        (method(source=SOURCE.replace("abcdef0", "main")), "must name its code"),
        (method(source="A paper.", default="paper"), "must name its publication"),
        (method(differences="some"), "must be 'none' or begin with '- '"),
    ],
)
def test_other_forms_are_refused(wrong: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_source(wrong)


def test_table_has_a_row_for_each_method() -> None:
    lines = methods_table({"Some": [method(), method(differences="- a | b")]}).splitlines()
    assert lines[0] == "## Some"
    assert lines[4:] == [
        f"| `Method` | {SOURCE} | **code** | none |",
        f"| `Method` | {SOURCE} | **code** | a \\| b |",
    ]
