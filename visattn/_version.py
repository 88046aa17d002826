"""The version of visattn, the same as in ``pyproject.toml``, and versions of other packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

__version__ = "0.1.0"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of visattn and of those packages that are installed, without importing
    them."""
    by_package = {"visattn": __version__}
    for name in packages:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package
