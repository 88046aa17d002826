"""The written form of patterns: what is read, what is refused, and the examples."""

import warnings

import pytest
from support.cases import EXAMPLES

from visattn import Grid, TokenLayout
from visattn.patterns import (
    PATTERNS,
    AxisOrder,
    Diagonal,
    Neighborhood,
    Radial,
    Sharded,
    Skip,
    Stencil,
    Stripe,
    Union,
    parse_pattern,
)
from visattn.patterns.grammar.call_grammar import signature_of


@pytest.mark.parametrize("name", PATTERNS)
def test_examples_hold_every_pattern(name):
    pattern = EXAMPLES[name]
    assert type(pattern) is PATTERNS[name]
    layout = TokenLayout(Grid(6, 8, 8))
    assert 0 <= pattern.density(layout) <= 1
    pattern.lower(layout, 32, 32)


@pytest.mark.parametrize(
    "pattern",
    [
        *EXAMPLES.values(),
        Diagonal(1e-05),
        Radial(decay=0.2, sink=True, rule="token", block=64),
        Neighborhood((1.0, 0.5, 7), stride=(1, 2, 2), dilation=2, causal=(True, False, False)),
        Stripe(first_frame=False, columns=(0, 0.5, (0, 0.25))),
        Sharded(1, 2**40, causal=True),
        Stencil((1, 2, 0.5), ((-1, 0, 2),), columns=(3,)),
        AxisOrder(Union(Diagonal(3), AxisOrder(Stripe(), "wht")), "twh"),
    ],
    ids=repr,
)
def test_written_form_gives_the_pattern_back(pattern):
    assert parse_pattern(repr(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("radial", Radial()),
        ("radial()", Radial()),
        ("  Radial( decay=.2,\n sink = true ) ", Radial(decay=0.2, sink=True)),
        ("RADIAL(1.0, False, rule='token')", Radial(rule="token")),
        ("Neighborhood((2, 7, 7), stride=(1,2,2))", Neighborhood((2, 7, 7), stride=(1, 2, 2))),
        ("union(diagonal(64), stripe())", Union(Diagonal(64), Stripe())),
        ("union(diagonal(64), stripe, Skip)", Union(Diagonal(64), Stripe(), Skip())),
        ('axis_order(diagonal(32), "hwt")', AxisOrder(Diagonal(32), "hwt")),
        ("AxisOrder(pattern=Diagonal(0.5))", AxisOrder(Diagonal(0.5))),
        ("stripe(columns=NONE)", Stripe()),
        ("stencil(4, ((-1, 0, 0), (0, 0, 0)))", Stencil(4, ((-1, 0, 0), (0, 0, 0)))),
    ],
)
def test_forms_that_are_read(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("kind", PATTERNS.values())
def test_both_names_in_any_case(kind):
    pattern = EXAMPLES[kind.name]
    arguments = repr(pattern).removeprefix(kind.__name__)
    for name in (kind.name, kind.name.upper(), kind.__name__.lower()):
        assert parse_pattern(name + arguments) == pattern


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "is no call", id="empty"),
        pytest.param("radial(", "is no call", id="open bracket"),
        pytest.param("radial; skip", "is no call", id="two statements"),
        pytest.param("diagonal(\0)", "is no call", id="null byte"),
        pytest.param("(" * 500, "is no call", id="brackets only"),
        pytest.param("diagonal(" + "-" * 9000 + "1)", "is no call", id="many signs"),
        pytest.param("diagonal(" + "9" * 9000 + ")", "is no call", id="many digits"),
        pytest.param("3", "does not start with a name", id="number"),
        pytest.param("radial() or skip()", "does not start with a name", id="operator"),
        pytest.param("x" * 10_001, "10001 characters", id="too long"),
        pytest.param("radiall()", "did you mean 'radial'", id="misspelt"),
        pytest.param("__import__('os')", "unknown pattern '__import__'; choices", id="import"),
        pytest.param("os.system('true')", "'os.system' is no name of a pattern", id="attribute"),
        pytest.param("radial()()", "'radial()' is no name of a pattern", id="call of a call"),
        pytest.param("radial(decai=1)", "did you mean 'decay'", id="misspelt parameter"),
        pytest.param(
            "radial(width=1)", "no parameter 'width'; its parameters are decay=1.0", id="w"
        ),
        pytest.param("dense(1)", "given 1 values; it has no parameters", id="no parameters"),
        pytest.param("diagonal()", "needs the parameter 'width'", id="missing"),
        pytest.param("halo(block=2)", "needs the parameter 'halo'", id="second missing"),
        pytest.param("diagonal(1, 2)", "given 2 values", id="too many"),
        pytest.param("diagonal(1, width=2)", "width twice", id="position and name"),
        pytest.param("diagonal(width=1, width=2)", "width twice", id="name twice"),
        pytest.param("union(patterns=skip)", "no parameter 'patterns'", id="union by name"),
        pytest.param("union(skip)", "two or more", id="union of one"),
        pytest.param("union(*x)", "'*x', which is no literal", id="star"),
        pytest.param("radial(**x)", "** in radial", id="two stars"),
        pytest.param("radial(decay=nan)", "decay of radial holds 'nan', which is no", id="nan"),
        pytest.param("radial(decay=-inf)", "holds '-inf', which is no literal", id="inf"),
        pytest.param("radial(decay=1e999)", "decay=inf must be finite", id="infinite"),
        pytest.param("radial(rule=token)", "a word in quotes", id="word without quotes"),
        pytest.param("radial(rule=block)", "a word in quotes", id="word that is a pattern"),
        pytest.param("radial(sink=1)", "sink=1 must be True or False", id="refused value"),
        pytest.param("diagonal(1/2)", "which is no literal", id="division"),
        pytest.param("diagonal(-True)", "which is no literal", id="negative truth"),
        pytest.param("diagonal([1])", "which is no literal", id="list"),
        pytest.param("diagonal(b'')", "which is no literal", id="bytes"),
        pytest.param("diagonal(1j)", "which is no literal", id="complex"),
        pytest.param("diagonal(2**63)", "which is no literal", id="power"),
        pytest.param("diagonal(9223372036854775808)", "largest allowed", id="beyond 64 bit"),
        pytest.param("axis_order(" * 40 + "skip" + ")" * 40, "nested deeper", id="deep calls"),
        pytest.param("block(" + "(" * 60 + "1" + ",)" * 60 + ")", "nested deeper", id="tuples"),
        pytest.param("diagonal(" + "not " * 2000 + "1)", "", id="deep operators"),
    ],
)
def test_wrong_text_gives_one_sentence(text, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        parse_pattern(text)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert 10 < len(message) < 500


def test_only_text_is_read():
    with pytest.raises(TypeError, match="not Radial"):
        parse_pattern(Radial())


def test_odd_literals_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError):
            parse_pattern(r"diagonal('\d')")


def test_signature_shows_parameters():
    assert signature_of(Skip) == ""
    assert signature_of(Union) == "*patterns"
    assert signature_of(Radial) == "decay=1.0, sink=False, rule='block', block=128"
