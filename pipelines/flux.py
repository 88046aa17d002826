"""Flux.1: joint attention with the text first, in blocks of two streams and then of one stream.
There is no cross-attention, and each pass is a separate call."""

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
    """Return the tokens of a call. ``hidden_states`` is ``[B, H * W, C]``, which does not have the
    width of the image: the grid is read from the values of ``img_ids``, once for each tensor (at
    each call in inference mode). Each number in their first column is a separate grid, as for the
    input image of Kontext.

    If ``torch.compile`` compiles the whole model, its graph breaks here, and the values are read
    between the graphs at each call; ``fullgraph=True`` is refused. Compiled blocks
    (``compile_repeated_blocks``) are not affected.

    Raises:
        ValueError: the positions are missing, or are not those of grids row by row.
    """
    ids, length = arguments.get("img_ids"), arguments["hidden_states"].shape[1]
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            "img_ids is missing; the height and width of the image are read from it, so pass it "
            "to the denoiser"
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
    """Return the grids that positions describe.

    Args:
        ids: ``[L, 3]`` or ``[1, L, 3]``: image, row and column of each token, as whole numbers
            within the precision of the dtype.
        length: number of tokens.

    Raises:
        ValueError: they are not grids row by row.
    """
    positions = ids[0] if ids.ndim == 3 else ids
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) != length:
        raise ValueError(
            f"img_ids of shape {list(ids.shape)} must be [{length}, 3]: image, row and column of "
            f"the {length} image tokens"
        )
    positions = positions.detach().cpu()
    changes = (positions[1:, 0] != positions[:-1, 0]).nonzero().flatten().add(1)
    starts = [0, *changes.tolist(), length]
    grids = []
    for first, end in itertools.pairwise(starts):
        rows, columns = positions[first:end, 1], positions[first:end, 2]
        later = (rows != rows[0]).nonzero()
        width = int(later[0]) if len(later) else end - first
        height = (end - first) // width
        row, column = (x[0].float() + torch.arange(x.numel()) for x in (rows, columns))
        if (
            height * width != end - first
            or not rows.equal(row[:height].to(positions.dtype).repeat_interleave(width))
            or not columns.equal(column[:width].to(positions.dtype).repeat(height))
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
