"""The grammar of calls: what is read without looking names up, and lists and dicts as arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest

from visattn.patterns.grammar.call_grammar import Call, CallGrammar, Word


def scaled(scale: float = 1.0, heads: dict[int, list[int]] | None = None, *, inner: Any = None):
    return ("scaled", scale, heads, inner)


GRAMMAR: CallGrammar[Any] = CallGrammar(
    noun="guidance",
    example="scaled(2.0)",
    kinds=lambda: {"scaled": scaled},
    literals="a number, a list or a dict",
    containers=True,
)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("word", Call("word", (), {})),
        ("Word()", Call("Word", (), {})),
        ("f(1, -2.5, b=(True, none))", Call("f", (1, -2.5), {"b": (True, None)})),
        ("f(g(x), y='z')", Call("f", (Call("g", (Word("x"),), {}),), {"y": "z"})),
        ("f({3: [0, 1], 'all': []})", Call("f", ({3: [0, 1], "all": []},), {})),
    ],
)
def test_read_needs_no_known_name(text, call):
    assert GRAMMAR.read(text) == call


def test_parse_builds_the_calls_in_arguments_first():
    assert GRAMMAR.parse("scaled(2, heads={3: [0]}, inner=Scaled(0.5))") == (
        "scaled", 2, {3: [0]}, ("scaled", 0.5, None, None)
    )
    assert GRAMMAR.parse("SCALED(inner=[scaled])")[3] == [("scaled", 1.0, None, None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scaled({True: 1})", "has the key 'True'; keys are integers or words in quotes"),
        ("scaled({1.0: 1})", "has the key '1.0'"),
        ("scaled({**x})", "has the key"),
        ("scaled({3: 1, 3: 2})", "has the key 3 twice"),
        ("scaled([x for x in y])", "which is no literal; write a number, a list or a dict"),
        ("scaled({1, 2})", "which is no literal"),
        ("scaled([1][0])", "which is no literal"),
        ("scaled(" + "[" * 100 + "]" * 100 + ")", "guidance 'scaled"),
        ("scaled(" + "[" * 40 + "]" * 40 + ")", "nested deeper than the 32 levels"),
        ("scald()", "unknown guidance 'scald', did you mean 'scaled'"),
        ("[scaled]", "guidance '[scaled]' does not start with a name"),
    ],
)
def test_wrong_text_is_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        GRAMMAR.parse(text)


def test_long_lists_are_read():
    heads = {layer: list(range(24)) for layer in range(60)}
    assert GRAMMAR.parse(f"scaled(heads={heads})")[2] == heads
