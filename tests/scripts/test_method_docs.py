"""The sections Source, Default and Differences: their reader, those of all methods, their table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from method_docs.sources import DEFAULTS, methods_table, read_source

ROOT = Path(__file__).resolve().parents[2]

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


def script() -> ModuleType:
    path = ROOT / "scripts" / "methods_table.py"
    spec = importlib.util.spec_from_file_location("methods_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patterns(own: ModuleType) -> list[type]:
    """The static and the dynamic ones."""
    groups = own.groups()
    return [*groups["Static patterns"], *groups["Dynamic patterns"]]


def test_every_method_has_its_source_and_the_committed_table_is_of_them() -> None:
    own = script()
    rows = [read_source(method) for methods in own.groups().values() for method in methods]
    assert len({row.name for row in rows}) == len(rows) >= 41
    assert {row.default for row in rows} == set(DEFAULTS)
    for row in map(read_source, patterns(own)):
        differs = row.default != "code" and "Code: " in row.source
        assert row.why or not differs, f"{row.name}: say why its default is not that of its code"
    written = own.TABLE.read_text(encoding="utf-8")
    assert written == own.text(), "docs/methods.md is stale: run scripts/methods_table.py"


NAMED = "selectors/test_named.py::test_mask_is_that_of_the_definition"
OUTPUTS = "selectors/test_outputs.py::test_output_is_that_of_the_definition"
# the test that holds the default of a pattern to its authors' rule, written anew in plain torch
HELD = {
    "Diagonal": "patterns/test_definitions.py::test_rule_is_the_definition",
    "MultiDiagonal": "patterns/test_definitions.py::test_rule_is_the_definition",
    "Radial": "patterns/test_radial.py::test_block_rule_is_the_drawn_one",
    "SlidingTile": "patterns/test_definitions.py::test_rule_is_the_definition",
    **dict.fromkeys(("Jenga", "Draft", "DFSAttn", "NABLA", "VSA", "XAttention", "Sparge"), NAMED),
    **dict.fromkeys(("MoBA", "VMoBA", "BiLevel"), NAMED),
    **dict.fromkeys(("PISA", "Rectified"), OUTPUTS),
    "ClusterBlocks": "selectors/test_memory.py::test_warm_clusters_begin_where_the_last_step_ended",
    "Agent": "selectors/test_outputs.py::test_published_agents",
}


def test_a_numeric_test_holds_every_pattern_whose_default_is_the_code() -> None:
    coded = {
        kind.__name__ for kind in patterns(script()) if read_source(kind).default == "code"
    }
    assert coded == set(HELD)
    for name, place in HELD.items():
        file, test = place.split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text
        assert f"{name}(" in text, f"{file} has no {name}"
