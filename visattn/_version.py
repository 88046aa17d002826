"""The version, which ``pyproject.toml`` has too, and those of other packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

__version__ = "0.1.0"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of visattn and of the packages that are installed, which are not imported."""
    found = {"visattn": __version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
