"""Named shapes of a model: the sizes, steps and guidance that its makers recommend."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from visattn._atomic import read_limited
from visattn.generation.job import COUNTS, SCALES, Job

__all__ = ["SHAPES_FILE", "read_shapes", "shape_of"]

SHAPES_FILE = "visattn_shapes.json"
DEFAULT = "default"
MOST_BYTES = 1 << 20
KEYS = (*COUNTS, *SCALES)
assert set(KEYS) <= {field.name for field in fields(Job)}


def read_shapes(model: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The shapes that lie in a model's folder, by name: ``visattn_shapes.json`` holds an object of
    objects with ``height``, ``width``, ``num_frames``, ``num_inference_steps``,
    ``guidance_scale``, ``guidance_scale_2`` and ``true_cfg_scale``. A folder without it, or a hub
    id, has none.

    Raises:
        ValueError: the file is something else.
    """
    path = Path(model) / SHAPES_FILE
    if not path.exists():
        return {}
    try:
        shapes = json.loads(read_limited(path, MOST_BYTES))
        for shape in shapes.values():
            unknown = set(shape) - set(KEYS)
            if unknown:
                raise ValueError(f"it has the unknown key {min(unknown)!r}")
            Job(prompt="", **shape)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{SHAPES_FILE} of model {str(model)!r} cannot be read: {error}") from None
    assert isinstance(shapes, dict)
    return shapes


def shape_of(model: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """The shape of a model by its name, as arguments of its pipeline; without a name its default,
    which is empty where the model has none.

    Raises:
        ValueError: the model has no such shape.
    """
    shapes = read_shapes(model)
    if name is None:
        return shapes.get(DEFAULT, {})
    if name not in shapes:
        has = f"has {', '.join(shapes)}" if shapes else f"has no {SHAPES_FILE}"
        raise ValueError(f"shape {name!r} is not one of model {str(model)!r}, which {has}")
    return shapes[name]
