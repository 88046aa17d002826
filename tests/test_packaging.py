"""The installed package holds what the tree holds: folders, symlinks, version."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

import visattn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("kernels", "pipelines")  # folders at the root that install inside the package
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = CONFIG["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Return the folder that setuptools takes ``package`` from."""
    mapping = SETUPTOOLS["package-dir"]
    head, tail = package, []
    while head not in mapping:
        head, _, last = head.rpartition(".")
        tail.insert(0, last)
    return ROOT.joinpath(mapping[head], *tail)


def test_packages_list_every_folder_with_modules():
    tops = [ROOT / "visattn", *(ROOT / name for name in OUTSIDE)]
    found = {
        Path(folder)
        for top in tops
        for folder, _, files in os.walk(top)  # does not follow the symlinks
        if any(name.endswith(".py") for name in files)
    }
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    missing = sorted(str(folder.relative_to(ROOT)) for folder in found - listed)
    assert not missing, f"add these folders to `packages` in pyproject.toml: {missing}"
    gone = sorted(str(folder.relative_to(ROOT)) for folder in listed if not folder.is_dir())
    assert not gone, f"`packages` in pyproject.toml lists folders that are not there: {gone}"


@pytest.mark.parametrize("name", OUTSIDE)
def test_symlink_points_from_the_package_to_the_root_folder(name):
    link = ROOT / "visattn" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


@pytest.mark.parametrize("name", [*OUTSIDE, "tests"])
def test_folder_is_no_package(name):
    """With an ``__init__.py`` in it, ``kernels`` would hide Hugging Face's package of that name."""
    assert [str(path) for path in (ROOT / name).rglob("__init__.py")] == []


def test_version_is_the_same_everywhere():
    version = CONFIG["project"]["version"]
    assert visattn.__version__ == version
    assert importlib.metadata.version("visattn") == version


def test_no_dependency_names_torchvision():
    """It pins one exact torch, so naming it would let pip replace the torch of the user."""
    project = CONFIG["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    assert [name for names in lists for name in names if "torchvision" in name] == []
