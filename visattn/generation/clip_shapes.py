"""Named shapes of a model: the sizes, steps and guidance scales that its authors recommend; and the
name of the scorer of its clips."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from visattn._atomic import read_limited
from visattn.generation.job import COUNTS, SCALES, Job

__all__ = ["SHAPES_FILE", "read_scorer_name", "read_shapes", "shape_of"]

SHAPES_FILE = "visattn_shapes.json"
DEFAULT = "default"
SCORER = "scorer"  # a key of the file that is no shape
MOST_BYTES = 1 << 20
KEYS = (*COUNTS, *SCALES)
assert set(KEYS) <= {field.name for field in fields(Job)}


def read_shapes(model: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read the named shapes of a model from ``visattn_shapes.json`` in its folder.

    Each shape is an object with any of ``height``, ``width``, ``num_frames``,
    ``num_inference_steps``, ``guidance_scale``, ``guidance_scale_2`` and ``true_cfg_scale``.
    The key ``scorer`` is no shape; see ``read_scorer_name``.

    Args:
        model: folder or hub id of a pipeline.

    Returns:
        The shapes by name; none for a hub id or a folder without the file.

    Raises:
        ValueError: the file is invalid.

    Example:
        >>> from pathlib import Path
        >>> from visattn.generation import read_shapes
        >>> _ = Path("visattn_shapes.json").write_text('{"small": {"height": 64, "width": 64}}')
        >>> read_shapes(".")
        {'small': {'height': 64, 'width': 64}}
    """
    return _read(model)[0]


def read_scorer_name(model: str | os.PathLike[str]) -> str | None:
    """Return the name of the scorer of a model's clips, ``scorer`` in ``visattn_shapes.json``; None
    where the file names none, or is missing.

    Raises:
        ValueError: the file holds something else.
    """
    return _read(model)[1]


def _read(model: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], str | None]:
    path = Path(model) / SHAPES_FILE
    if not path.exists():
        return {}, None
    try:
        shapes = json.loads(read_limited(path, MOST_BYTES))
        scorer = shapes.pop(SCORER, None) if isinstance(shapes, dict) else None
        if not isinstance(scorer, str | None):
            raise ValueError(f"scorer={scorer!r} must be a text")
        for shape in shapes.values():
            unknown = set(shape) - set(KEYS)
            if unknown:
                raise ValueError(f"it has the unknown key {min(unknown)!r}")
            Job(prompt="", **shape)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{SHAPES_FILE} of model {str(model)!r} cannot be read: {error}") from None
    return shapes, scorer


def shape_of(model: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """Return a named shape of a model.

    Args:
        model: folder or hub id of a pipeline.
        name: name of the shape; None for the default of the model.

    Returns:
        Arguments of the pipeline; empty if the model has no default shape.

    Raises:
        ValueError: the model has no such shape.

    Example:
        >>> from pathlib import Path
        >>> from visattn.generation import shape_of
        >>> _ = Path("visattn_shapes.json").write_text('{"default": {"num_frames": 9}}')
        >>> shape_of(".")
        {'num_frames': 9}
    """
    shapes = read_shapes(model)
    if name is None:
        return shapes.get(DEFAULT, {})
    if name not in shapes:
        has = f"has {', '.join(shapes)}" if shapes else f"has no {SHAPES_FILE}"
        raise ValueError(f"shape {name!r} is not one of model {str(model)!r}, which {has}")
    return shapes[name]
