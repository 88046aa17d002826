"""Flux.1: joint attention with the text in front, in blocks of two streams and then of one; text
comes in by no other way, and each pass is a call of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from visattn.geometry.layout import Tokens
from visattn.pipelines.family import Family
from visattn.runtime.private_names import tensor_version

__all__ = ["FLUX"]

# grids by the tensor of positions that they were read from, with the version of its values
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def tokens(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """``hidden_states`` is ``[B, H * W, C]``, which does not say how wide the image is: the grid is
    read from the values of ``img_ids``, once for a tensor (at each call in inference mode). Each
    number in their first column is a grid of its own, as of the image that Kontext is given.

    A model that ``torch.compile`` takes as a whole ends its graph here, so that they are read in
    between, at each call; with ``fullgraph=True`` it is refused. Compiled blocks
    (``compile_repeated_blocks``) are not concerned.

    Raises:
        ValueError: the positions are missing, or are not those of grids row by row.
    """
    ids, length = arguments.get("img_ids"), arguments["hidden_states"].shape[1]
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            "img_ids is not given, and the height and width of the image are read from it; call "
            "the denoiser with it"
        )
    text = ("text", arguments["encoder_hidden_states"].shape[1])
    return (text, *_grids(ids, length))


def _grids(ids: torch.Tensor, length: int) -> Tokens:
    tracked = not torch.compiler.is_compiling() and not ids.is_inference()
    if tracked and ids in _read:
        version, of_length, grids = _read[ids]
        if version == tensor_version(ids) and of_length == length:
            return grids  # type: ignore[no-any-return]
    grids = grids_of(ids, length)
    if tracked:
        _read[ids] = tensor_version(ids), length, grids
    return grids


def grids_of(ids: torch.Tensor, length: int) -> Tokens:
    """The grids of positions.

    Args:
        ids: ``[L, 3]`` or ``[1, L, 3]``: image, row and column of each token, whole numbers as far
            as their dtype has them.
        length: how many tokens there are.

    Raises:
        ValueError: they are not grids row by row.
    """
    own = ids[0] if ids.ndim == 3 else ids
    if own.ndim != 2 or own.shape[1] != 3 or len(own) != length:
        raise ValueError(
            f"img_ids of shape {list(ids.shape)} must be [{length}, 3]: image, row and column of "
            f"the {length} image tokens"
        )
    own = own.detach().cpu()
    starts = [0, *(own[1:, 0] != own[:-1, 0]).nonzero().flatten().add(1).tolist(), length]
    grids = []
    for first, end in itertools.pairwise(starts):
        rows, columns = own[first:end, 1], own[first:end, 2]
        later = (rows != rows[0]).nonzero()
        width = int(later[0]) if len(later) else end - first
        height = (end - first) // width
        row, column = (x[0].float() + torch.arange(x.numel()) for x in (rows, columns))
        if (
            height * width != end - first
            or not rows.equal(row[:height].to(own.dtype).repeat_interleave(width))
            or not columns.equal(column[:width].to(own.dtype).repeat(height))
        ):
            raise ValueError(
                f"img_ids from token {first} to {end} are not the positions of a grid row by row, "
                "so that the height and width of the image are not known"
            )
        grids.append(("grid", 1, height, width))
    return tuple(grids)


FLUX = Family(
    name="Flux",
    models=("FluxTransformer2DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    tokens=tokens,
    calls=("cond", "uncond"),
    blocks=(r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
    timestep_unit=1000,
    fused_out_projection="proj_out",
)
