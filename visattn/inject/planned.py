"""Records which denoisers of a pipeline have a plan, to detect one that was replaced later."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.attachment import attached

__all__ = ["note_planned", "planned", "replaced"]

ATTRIBUTE = "_visattn_planned"


Models = Mapping[str, weakref.ref[torch.nn.Module]]


class _WeakModels(dict[str, "weakref.ref[torch.nn.Module]"]):
    """Weak references by role. These cannot be pickled, so a pickle holds None instead."""

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: object) -> _WeakModels:
        return _WeakModels(self)


def planned(pipe: Any) -> Models | None:
    """Return the denoisers that have the plan of a pipeline, by role; None: there is no plan."""
    models: Models | None = vars(pipe).get(ATTRIBUTE)
    return models


def note_planned(pipe: Any, models: Models | None) -> None:
    """Record on a pipeline which of its denoisers have its plan. Nothing is recorded on a denoiser
    without a pipeline.

    Args:
        pipe: the pipeline or denoiser.
        models: the denoisers by role; None: there is no plan.
    """
    vars(pipe).pop(ATTRIBUTE, None)
    if models is not None and not isinstance(pipe, torch.nn.Module):
        vars(pipe)[ATTRIBUTE] = _WeakModels(models)


def replaced(pipe: Any, models: Mapping[str, torch.nn.Module]) -> tuple[str, ...]:
    """Return the roles whose denoiser replaced one with a plan and has no plan itself."""
    return tuple(
        role
        for role, model in (planned(pipe) or {}).items()
        if role in models and models[role] is not model() and attached(models[role]) is None
    )
