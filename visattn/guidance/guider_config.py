"""Reads and writes configurations of guiders of diffusers, which are JSON values. A guidance is
written as its text form. Importing this module imports diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from diffusers.guiders.guider_utils import BaseGuidance

from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.head_set import HeadSet, json_heads
from visattn.guidance.registry import GRAMMAR, GUIDANCES, parse_guidance
from visattn.patterns.grammar.call_grammar import Call

__all__ = ["BASES", "read_base", "read_guidance", "read_heads", "written_base", "written_heads"]

# The guiders of diffusers that can be the base of PerturbedGuidance.
BASES = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "TangentialClassifierFreeGuidance",
)


def written_base(base: object) -> dict[str, Any]:
    """Return the configuration of a guider: its name and parameters.

    Args:
        base: a guider of diffusers, or its configuration.

    Raises:
        TypeError: ``base`` is neither.
        ValueError: it is no guider of BASES.
    """
    if isinstance(base, BaseGuidance):
        parameters = {key: value for key, value in base.config.items() if not key.startswith("_")}
        config: dict[str, Any] = {"name": type(base).__name__, **parameters}
    elif isinstance(base, Mapping):
        config = dict(base)
    else:
        raise TypeError(f"base={base!r} must be a guider of diffusers, or its configuration")
    if config.get("name") not in BASES:
        raise ValueError(f"base is {config.get('name')}; it must be one of {', '.join(BASES)}")
    return config


def read_base(base: BaseGuidance | Mapping[str, object]) -> BaseGuidance:
    """Return a guider from itself or its configuration.

    Args:
        base: as of ``written_base``.
    """
    if isinstance(base, BaseGuidance):
        return base
    import diffusers.guiders

    config = written_base(base)
    return cast("BaseGuidance", getattr(diffusers.guiders, config.pop("name"))(**config))


def read_heads(heads: object) -> Mapping[int | str, object] | None:
    """Return heads by layer from a configuration, where numbers may be text.

    Args:
        heads: by layer, or None.

    Raises:
        TypeError: ``heads`` is neither.
    """
    if heads is None:
        return None
    if not isinstance(heads, Mapping):
        raise TypeError(
            f"heads={heads!r} must be a HeadSet, or heads by layer, as in {{3: {{0: 1.0}}}}"
        )
    return {
        _number(layer): {_number(head): strength for head, strength in chosen.items()}
        if isinstance(chosen, Mapping)
        else chosen
        for layer, chosen in heads.items()
    }


def _number(key: object) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def written_heads(heads: HeadSet | Mapping[int | str, object] | None) -> dict[str, Any] | None:
    """Return heads by layer as JSON values.

    Args:
        heads: as of SoftPAG.
    """
    if heads is None:
        return None
    layers: Mapping[Any, Any] = heads.layers if isinstance(heads, HeadSet) else heads
    return {str(layer): json_heads(chosen) for layer, chosen in layers.items()}


def read_guidance(value: object) -> Guidance:
    """Return a guidance.

    Args:
        value: a guidance, its text form, or a configuration of an older version.

    Raises:
        TypeError: ``value`` is something else, or no guidance by a perturbed pass.
        ValueError: there is no such guidance, or an argument is out of range.
    """
    guidance = value
    if isinstance(value, str):
        guidance = parse_guidance(value)
    elif isinstance(value, Mapping):
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        if "name" not in values:
            raise ValueError(f"guidance={value!r} must have a name, as in {{'name': 'SEG'}}")
        if "heads" in values:
            values["heads"] = read_heads(values["heads"])
        guidance = GRAMMAR.build(Call(str(values.pop("name")), (), cast("Any", values)))
    if not isinstance(guidance, Guidance):
        names = [name for name, kind in GUIDANCES.items() if issubclass(kind, Guidance)]
        raise TypeError(
            f"guidance={value!r} must be one of {', '.join(names)}, or its text form; for "
            "CFG-Zero* use base=ClassifierFreeZeroStarGuidance() of diffusers"
        )
    return guidance
