"""The denoisers of a pipeline, their model families and their attention modules."""

from __future__ import annotations

import re
from typing import Any

import torch

from visattn.inject.models.wrappers import bare, unwrapped
from visattn.pipelines.families import FAMILIES
from visattn.pipelines.family import Family
from visattn.plan import ROLES, Denoiser

__all__ = [
    "attention_layers",
    "cross_layers",
    "denoisers",
    "describe",
    "family_of",
    "is_denoiser",
    "known_denoisers",
    "models_of",
]


def denoisers(pipe: Any) -> dict[str, Denoiser]:
    """Return a description of the denoisers of a pipeline, as ``Plan(denoisers=...)`` records it.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.

    Returns:
        Class, number of attention layers and number of heads by role, without the denoisers whose
        model family visattn does not know.

    Example:
        >>> from visattn.inject import denoisers
        >>> print(denoisers(pipe)["transformer"])
        WanTransformer3DModel with 3 layers of 4 heads
    """
    return {
        role: describe(model, family)
        for role, model in models_of(pipe).items()
        if (family := family_of(model))
    }


def known_denoisers(pipe: Any) -> dict[str, tuple[torch.nn.Module, Family]]:
    """Return the denoisers of known model families with their families, by role; at least one.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.

    Raises:
        ValueError: visattn knows the family of no denoiser.
    """
    models = models_of(pipe)
    known = {
        role: (model, family) for role, model in models.items() if (family := family_of(model))
    }
    if not known:
        kinds = ", ".join(type(model).__name__ for model in models.values())
        no_denoiser = f"no denoiser under {', '.join(ROLES[:-1])} or {ROLES[-1]}"
        raise ValueError(
            f"pipe={type(pipe).__name__} has {kinds or no_denoiser}; plans can be "
            f"applied to {', '.join(sorted(FAMILIES))}; in another model, call "
            "visattn.sparse_attention where it computes its attention"
        )
    return known


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the denoisers of a pipeline by role, without the modules that ``torch.compile``,
    distributed training and PEFT wrap around them. A module is its own transformer.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.
    """
    if is_denoiser(pipe):
        return {"transformer": unwrapped(pipe)[-1]}
    models = {role: getattr(pipe, role, None) for role in ROLES}
    return {
        role: unwrapped(model)[-1]
        for role, model in models.items()
        if isinstance(model, torch.nn.Module)
    }


def is_denoiser(pipe: Any) -> bool:
    """Return whether ``pipe`` is a denoiser without a pipeline."""
    return isinstance(pipe, torch.nn.Module)


def family_of(model: torch.nn.Module) -> Family | None:
    """Return the family of a denoiser, by its class or a base class; None if it is not known."""
    kinds = (kind.__name__ for kind in type(model).__mro__)
    return next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), None)


def attention_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """Return the attention modules of a denoiser that a plan can name, by path, in their order.

    Args:
        model: the denoiser.
        family: its family.

    Raises:
        ValueError: the denoiser has no such module.
    """
    layers = {
        bare(path): module
        for path, module in model.named_modules()
        if re.fullmatch(family.layers, bare(path))
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layer with a path like {family.layers!r}, "
            f"which models of {family.name} have, so no plan or edit can be applied to it; "
            "pass the denoiser of a published pipeline"
        )
    return layers


def cross_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """Return the cross-attention modules of a denoiser by path, in their order."""
    if not family.cross:
        return {}
    return {
        bare(path): module
        for path, module in model.named_modules()
        if re.fullmatch(family.cross, bare(path))
    }


def describe(model: torch.nn.Module, family: Family) -> Denoiser:
    """Return the description of a denoiser that plans record."""
    layers = attention_layers(model, family)
    kind = next(k.__name__ for k in type(model).__mro__ if k.__name__ in family.models)
    return Denoiser(kind, len(layers), next(iter(layers.values())).heads)
