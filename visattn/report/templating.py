"""The templates of the page: the jinja2 files in ``templates/``. They escape every text."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from visattn.report.colors import kind_class
from visattn.report.figures import figure, plain

__all__ = ["render"]


def render(name: str, /, **values: object) -> Markup:
    """Return a template with its values filled in.

    Args:
        name: the file in ``templates/`` without ``.html.j2``.
        values: ``Markup`` is inserted as it is, ``None`` as nothing, anything else escaped.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    return Markup(_environment().get_template(f"{name}.html.j2").render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("visattn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "" if value is None else value,
    )
    environment.filters |= {"figure": figure, "plain": plain, "kind_class": kind_class}
    return environment
