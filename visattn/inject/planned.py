"""Which denoisers of a pipeline were given a plan, so that one that took their place is noticed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.attachment import attached

__all__ = ["note_planned", "planned", "replaced"]

ATTRIBUTE = "_visattn_planned"


Models = Mapping[str, weakref.ref[torch.nn.Module]]


class _Noted(dict[str, "weakref.ref[torch.nn.Module]"]):
    """By role, weakly, which cannot be pickled: what is read is None."""

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: object) -> _Noted:
        return _Noted(self)


def planned(pipe: Any) -> Models | None:
    """The denoisers that the plan of a pipeline is on, by role."""
    found: Models | None = vars(pipe).get(ATTRIBUTE)
    return found


def note_planned(pipe: Any, found: Models | None) -> None:
    """Note them on the pipeline, a denoiser alone excepted; None: there is no plan."""
    vars(pipe).pop(ATTRIBUTE, None)
    if found is not None and not isinstance(pipe, torch.nn.Module):
        vars(pipe)[ATTRIBUTE] = _Noted(found)


def replaced(pipe: Any, models: Mapping[str, torch.nn.Module]) -> tuple[str, ...]:
    """Roles whose denoiser took the place of one with a plan, and has none itself."""
    return tuple(
        role
        for role, model in (planned(pipe) or {}).items()
        if role in models and models[role] is not model() and attached(models[role]) is None
    )
