"""What a search for heads is given, held against the pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from visattn._arguments import as_indices, is_integer
from visattn.guidance.head_set import HeadSet
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import attached, attention_layers
from visattn.inject.hooks.class_swap import kind_of
from visattn.plan.json_format import check_values, shown

__all__ = [
    "Candidate",
    "heads_of",
    "plans_of",
    "read_call",
    "read_candidates",
    "read_kept",
    "read_pairs",
]

# arguments of a pipeline's call that are the search's own
OURS = (
    "prompt",
    "generator",
    "output_type",
    "latents",
    "num_videos_per_prompt",
    "num_images_per_prompt",
    "callback_on_step_end",
    "return_dict",
    "image",
)


class Candidate(NamedTuple):
    """A head: the number of its layer, by which ties are decided, its own, and the layer's path."""

    number: int
    head: int
    path: str


def read_pairs(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Every prompt with every seed."""
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompts={shown(prompts)} must be a list of texts")
    own = as_indices("seeds", seeds)
    for name, values in (("prompts", prompts), ("seeds", own)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={shown(list(values))} must hold one at least, and none twice")
    return [(text, seed) for text in prompts for seed in own]


def heads_of(pipe: Any) -> dict[str, int]:
    """How many heads the attention layers of a pipeline have, by path."""
    if isinstance(pipe, torch.nn.Module):
        raise TypeError(
            f"pipe={type(pipe).__name__} is a denoiser alone; a search generates, so give the "
            "whole pipeline"
        )
    return {
        path: int(module.heads)
        for model, family in known_denoisers(pipe).values()
        for path, module in attention_layers(model, family).items()
    }


def read_call(pipe: Any, call: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a pipeline's call, held against what it takes."""
    own = dict(call or {})
    known = [
        name
        for name in inspect.signature(kind_of(pipe).__call__).parameters
        if name not in ("self", *OURS)
    ]
    for name in own:
        if name not in known:
            raise ValueError(
                f"call has the key {name!r}; {type(pipe).__name__} takes here {', '.join(known)}"
            )
    check_values("call", own)
    plain: dict[str, Any] = json.loads(json.dumps(own))
    return plain


def read_kept(
    keep: HeadSet | Mapping[int | str, object] | None, heads: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """The strengths of the heads that are perturbed from the start."""
    return {} if keep is None else _read("keep", keep, heads)


def read_candidates(
    given: HeadSet | Mapping[int | str, object] | None,
    heads: Mapping[str, int],
    kept: Mapping[str, Mapping[int, float]],
) -> list[Candidate]:
    """The heads that are tried, in order, without those that are kept."""
    named = _read("candidates", dict.fromkeys(heads) if given is None else given, heads)
    paths = list(heads)
    return sorted(
        Candidate(paths.index(path), head, path)
        for path, own in named.items()
        for head in own
        if head not in kept.get(path, {})
    )


def _read(name: str, given: Any, heads: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """Heads with strengths by the path of their layer."""
    layers = given.layers if isinstance(given, HeadSet) else given
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"{name}={shown(given)} must be a HeadSet, heads by layer as in {{3: [0, 5]}}, or None"
        )
    paths = list(heads)
    out: dict[str, dict[int, float]] = {}
    for layer, chosen in layers.items():
        path = layer
        if isinstance(layer, int) and -len(paths) <= layer < len(paths):
            path = paths[layer]
        if path not in heads:
            raise ValueError(
                f"{name} names the layer {layer!r}; there are {len(paths)}, {paths[0]} to "
                f"{paths[-1]}"
            )
        own: Any = range(heads[path]) if chosen is None else chosen
        if not isinstance(own, Mapping):
            own = dict.fromkeys([own] if isinstance(own, int) else own, 1.0)
        for head in own:
            if not is_integer(head) or not 0 <= head < heads[path]:
                raise ValueError(
                    f"{name} names head {head!r} of {path}; it has {heads[path]} heads, from 0 on"
                )
        out.setdefault(path, {}).update({head: float(u) for head, u in own.items()})
    return {path: own for path, own in out.items() if own}


def plans_of(pipe: Any) -> dict[str, str]:
    """The plans that a pipeline's denoisers have."""
    own = {role: attached(model) for role, (model, _) in known_denoisers(pipe).items()}
    return {role: one.plan.to_json() for role, one in own.items() if one and one.plan.rules}
