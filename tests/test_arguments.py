"""The shared checks of arguments: what passes, what does not, and the sentence."""

import math

import pytest

from visattn import _arguments as arguments

BOOLS = (True, False)
NUMBERS = (0, -3, 1.5, math.nan, math.inf)


def refusal(check, *args, **kwargs):
    """Return the type and the text of the error of a check."""
    with pytest.raises((TypeError, ValueError)) as caught:
        check(*args, **kwargs)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("value", [*BOOLS, "1", None, 1j])
def test_no_number(value):
    assert not arguments.is_integer(value)
    assert not arguments.is_number(value)


def test_numbers():
    assert all(map(arguments.is_number, NUMBERS))
    assert [arguments.is_integer(value) for value in NUMBERS] == [True, True, False, False, False]


def test_count():
    assert arguments.check_count("tiles", 3, 1, 3) == 3
    assert refusal(arguments.check_count, "tiles", True, 1) == (
        TypeError,
        "tiles=True must be an integer of at least 1",
    )
    assert refusal(arguments.check_count, "tiles", 0, 1)[1] == "tiles=0 must be at least 1"
    assert refusal(arguments.check_count, "tiles", 4, 1, 3)[1] == "tiles=4 must be at most 3"
    assert refusal(arguments.check_block, "block", 65537)[1] == "block=65537 must be at most 65536"
    assert arguments.check_block("block", 65536) == 65536


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_share(value):
    arguments.check_share("mass", value)
    if value == 0:
        text = refusal(arguments.check_share, "mass", value, above=True)[1]
        assert text == f"mass={value} must be above 0 and at most 1"


@pytest.mark.parametrize("value", [-0.1, 1.1, 2, math.nan])
def test_no_share(value):
    text = f"mass={value} must be at least 0 and at most 1"
    assert refusal(arguments.check_share, "mass", value) == (ValueError, text)


def test_keep():
    for value in (1, 700, 0.01, 1.0):
        arguments.check_keep("keep", value)
    for value in (0, -1, 0.0, 1.5, math.nan):
        assert refusal(arguments.check_keep, "keep", value)[0] is ValueError
    assert refusal(arguments.check_keep, "keep", True)[0] is TypeError


def test_size():
    arguments.check_sizes("window", (1, 0.5, 9.0))
    arguments.check_size("width", 0.0, minimum=0)
    for value in (0, 0.0, math.nan, math.inf, -1.0):
        assert refusal(arguments.check_size, "width", value)[0] is ValueError
    for value in ((), (1, 1, 1, 1)):
        assert "a tuple of up to three" in refusal(arguments.check_sizes, "window", value)[1]
    assert refusal(arguments.check_sizes, "window", (1, "2"))[0] is TypeError


def test_words_and_flags():
    arguments.check_word("by", "mass", ("mass", "count"))
    text = "by='sum' must be one of mass, count"
    assert refusal(arguments.check_word, "by", "sum", ("mass", "count")) == (ValueError, text)
    arguments.check_flag("sink", False)
    assert refusal(arguments.check_flag, "sink", 1) == (TypeError, "sink=1 must be True or False")


def test_number():
    arguments.check_number("NAG", "scale", 3, "a finite number")
    for value in (math.nan, True, "3"):
        text = f"NAG(scale={value!r}) must be a finite number"
        assert refusal(arguments.check_number, "NAG", "scale", value, "a finite number")[1] == text
    text = refusal(arguments.check_number, "Skip", "share", 0, *arguments.POSITIVE_SHARE)[1]
    assert text == "Skip(share=0) must be above 0 and at most 1"


def test_indices():
    assert arguments.as_indices("tokens", 4) == (4,)
    assert arguments.as_indices("tokens", [0, 7]) == (0, 7)
    for value in ("12", None, 1.0):
        assert refusal(arguments.as_indices, "tokens", value)[0] is TypeError
    for value in ([True], -1, [1, -1], [1.0]):
        assert refusal(arguments.as_indices, "tokens", value)[0] is ValueError


def test_window():
    for bounds in ((0, 5), (0.0, 1.0), (0.5, 3)):
        arguments.check_window("Edit", *bounds)
    for bounds in ((5, 5), (0.4, 0.2), (-1, 2), (0, True), (0.0, 1.5)):
        assert refusal(arguments.check_window, "Edit", *bounds)[0] is ValueError
    assert [step for step in range(10) if arguments.in_window(0.2, 5, step, 10)] == [2, 3, 4]
