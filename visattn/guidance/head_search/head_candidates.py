"""Reads the arguments of a search for heads, and checks them against the pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from visattn._arguments import as_indices, is_integer
from visattn.guidance.head_set import HeadSet
from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import kind_of
from visattn.inject.models.denoisers import attention_layers, known_denoisers
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

# arguments of a pipeline's call that the search sets
SET_BY_SEARCH = (
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
    """A head. Candidates are sorted by layer and head, which decides ties.

    Attributes:
        layer_index: index of the layer.
        head: index of the head.
        path: module path of the layer.
    """

    layer_index: int
    head: int
    path: str


def read_pairs(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Return every prompt with every seed.

    Args:
        prompts: texts.
        seeds: whole numbers from 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a list is empty, or holds a value twice.
    """
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompts={shown(prompts)} must be a list of texts")
    checked_seeds = as_indices("seeds", seeds)
    for name, values in (("prompts", prompts), ("seeds", checked_seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name}={shown(list(values))} must hold at least one value, and none twice"
            )
    return [(text, seed) for text in prompts for seed in checked_seeds]


def heads_of(pipe: Any) -> dict[str, int]:
    """Return the number of heads of the attention layers of a pipeline, by path.

    Args:
        pipe: a diffusers pipeline of a known family.

    Raises:
        TypeError: it is a denoiser without its pipeline.
    """
    if isinstance(pipe, torch.nn.Module):
        raise TypeError(
            f"pipe={type(pipe).__name__} is only a denoiser; the search generates frames, so pass "
            "the whole pipeline"
        )
    return {
        path: int(module.heads)
        for model, family in known_denoisers(pipe).values()
        for path, module in attention_layers(model, family).items()
    }


def read_call(pipe: Any, call: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of a pipeline's call as JSON values.

    Args:
        pipe: a diffusers pipeline.
        call: the arguments; None means none.

    Raises:
        TypeError: a value is no JSON value.
        ValueError: the pipeline takes no such argument, or the search sets it.
    """
    arguments = dict(call or {})
    known = [
        name
        for name in inspect.signature(kind_of(pipe).__call__).parameters
        if name not in ("self", *SET_BY_SEARCH)
    ]
    for name in arguments:
        if name not in known:
            raise ValueError(
                f"call has the key {name!r}; for {type(pipe).__name__} it may have "
                f"{', '.join(known)}"
            )
    check_values("call", arguments)
    plain: dict[str, Any] = json.loads(json.dumps(arguments))
    return plain


def read_kept(
    keep: HeadSet | Mapping[int | str, object] | None, heads: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """Return the strengths of the heads that are perturbed from the start, by path of the layer.

    Args:
        keep: as of ``search_heads``.
        heads: number of heads of each layer, by path.

    Raises:
        TypeError: ``keep`` has another form.
        ValueError: it names a layer or head that the pipeline does not have.
    """
    return {} if keep is None else _read("keep", keep, heads)


def read_candidates(
    given: HeadSet | Mapping[int | str, object] | None,
    heads: Mapping[str, int],
    kept: Mapping[str, Mapping[int, float]],
) -> list[Candidate]:
    """Return the heads to try, sorted by layer and head, without those that are kept.

    Args:
        given: ``candidates`` of ``search_heads``.
        heads: number of heads of each layer, by path.
        kept: heads that are perturbed from the start.

    Raises:
        TypeError: ``given`` has another form.
        ValueError: it names a layer or head that the pipeline does not have.
    """
    heads_by_path = _read("candidates", dict.fromkeys(heads) if given is None else given, heads)
    paths = list(heads)
    return sorted(
        Candidate(paths.index(path), head, path)
        for path, strengths in heads_by_path.items()
        for head in strengths
        if head not in kept.get(path, {})
    )


def _read(name: str, given: Any, heads: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """Return the strengths of heads, by path of their layer."""
    layers = given.layers if isinstance(given, HeadSet) else given
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"{name}={shown(given)} must be a HeadSet, heads by layer as in {{3: [0, 5]}}, or None"
        )
    paths = list(heads)
    strengths: dict[str, dict[int, float]] = {}
    for layer, chosen in layers.items():
        path = layer
        if isinstance(layer, int) and -len(paths) <= layer < len(paths):
            path = paths[layer]
        if path not in heads:
            raise ValueError(
                f"{name} names the layer {layer!r}; there are {len(paths)} layers, {paths[0]} to "
                f"{paths[-1]}"
            )
        of_layer: Any = range(heads[path]) if chosen is None else chosen
        if not isinstance(of_layer, Mapping):
            of_layer = dict.fromkeys([of_layer] if isinstance(of_layer, int) else of_layer, 1.0)
        for head in of_layer:
            if not is_integer(head) or not 0 <= head < heads[path]:
                raise ValueError(
                    f"{name} names head {head!r} of {path}; it has {heads[path]} heads, which "
                    "count from 0"
                )
        strengths.setdefault(path, {}).update({head: float(s) for head, s in of_layer.items()})
    return {path: of_layer for path, of_layer in strengths.items() if of_layer}


def plans_of(pipe: Any) -> dict[str, str]:
    """Return the plans of a pipeline's denoisers as JSON, by role.

    Args:
        pipe: a diffusers pipeline of a known family.
    """
    attachments = {role: attached(model) for role, (model, _) in known_denoisers(pipe).items()}
    return {
        role: attachment.plan.to_json()
        for role, attachment in attachments.items()
        if attachment and attachment.plan.rules
    }
