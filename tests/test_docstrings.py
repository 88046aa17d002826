"""The docstrings of the public names: Google style, one argument a line, an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from typing import Any

import pytest

# The packages whose ``__all__`` is public.
PACKAGES = (
    "visattn",
    "visattn.attention",
    "visattn.bench",
    "visattn.cost",
    "visattn.flex",
    "visattn.generation",
    "visattn.guidance",
    "visattn.inject",
    "visattn.metrics",
    "visattn.patterns",
    "visattn.plan",
    "visattn.readout",
    "visattn.report",
    "visattn.search",
    "visattn.selectors",
)
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Example", "Attributes", "Note")


def public(package: str) -> dict[str, Any]:
    """Return the public functions and classes of a package that visattn defines."""
    module = importlib.import_module(package)
    names = {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in names.items()
        if (inspect.isclass(value) or inspect.isroutine(value))
        and value.__module__.startswith("visattn")
    }


def wrong(value: Any) -> list[str]:
    """Return what a docstring lacks, or has in another form."""
    text = inspect.getdoc(value) or ""
    if not text:
        return ["no docstring"]
    faults = []
    if not re.search(r"^Examples?:\n(?:.*\n)*?\s+>>> ", text, re.MULTILINE):
        faults.append("no Example section with >>>")
    arguments = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    if arguments and re.search(r";\s+\w+: ", arguments[1]):
        faults.append("two arguments on one line")
    if inspect.isroutine(value) and arguments:
        written = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", arguments[1], re.MULTILINE))
        unknown = written - set(inspect.signature(value).parameters)
        if unknown:
            faults.append(f"arguments that it does not take: {sorted(unknown)}")
    return faults


@pytest.mark.parametrize("package", PACKAGES)
def test_form(package):
    faults = {name: wrong(value) for name, value in public(package).items()}
    assert {name: fault for name, fault in faults.items() if fault} == {}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """What the examples call ``pipe``: a text-to-video pipeline, here a tiny one."""
    from support import tiny

    return tiny.wan21()


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_run(package, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed = []
    for name, value in public(package).items():
        for example in finder.find(value, name, globs={"pipe": pipe}):
            lines: list[str] = []
            runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
            if runner.run(example, out=lines.append).failed:
                failed.append("".join(lines))
    assert not failed, "\n".join(failed)


def test_what_is_wrong_is_found():
    def function(first, second):
        """Do.

        Args:
            first: one; second: two.
            third: three.
        """

    assert wrong(function) == [
        "no Example section with >>>",
        "two arguments on one line",
        "arguments that it does not take: ['third']",
    ]
