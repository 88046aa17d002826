"""Public names, their parameters, and the options of commands are those of README and CHANGELOG."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from visattn.cli import main

LIST = Path(__file__).resolve().parent / "support" / "public_names.txt"
LINES = [line for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
NAMES = [line for line in LINES if line.startswith("visattn.")]
COMMANDS = [line for line in LINES if line.startswith("visattn ")]


def public_object(path: str) -> object:
    """Return what ``path`` names: a module, or an attribute of what comes before its last dot."""
    result = importlib.import_module("visattn")
    parts = path.split(".")
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(result, part):
            importlib.import_module(".".join(parts[:number]))
        result = getattr(result, part)
    return result


def lost(line: str) -> list[str]:
    """Return the parameters of a line of the list that its object no longer has in this order."""
    path, _, parameters = line.rstrip(")").partition("(")
    target = public_object(path)
    if not parameters:
        return []
    assert callable(target)
    names = parameters.split(", ")
    today = [name for name in inspect.signature(target).parameters if name in names]
    return [name for name in names if name not in today] or ([] if today == names else names)


def options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the options in the usage of ``command``."""
    assert main([*command.split()[1:], "--help"]) == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", usage))


def test_the_list_is_whole():
    assert len(NAMES) > 150 and len(COMMANDS) == 12
    assert len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", NAMES, ids=[line.partition("(")[0] for line in NAMES])
def test_public_name_and_parameters_exist(line):
    assert lost(line) == []


@pytest.mark.parametrize("line", COMMANDS, ids=[line.partition(" --")[0] for line in COMMANDS])
def test_command_has_its_options(line, capsys):
    command, *names = re.split(r" (?=--)", line)
    assert set(names) - options(command, capsys) == set()


@pytest.mark.parametrize(
    "line",
    [
        "visattn.patterns.Radial(decay, sink, rule, size)",
        "visattn.patterns.Radial(sink, decay, rule, block)",
    ],
)
def test_lost_and_moved_parameters_are_noticed(line):
    assert lost(line) != []


def test_lost_names_are_noticed():
    with pytest.raises(ImportError):
        public_object("visattn.patterns.Radical")
