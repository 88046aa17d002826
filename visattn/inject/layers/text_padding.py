"""Padding of the text in an attention call: reads the text lengths from the mask, and removes the
padding tokens."""

from __future__ import annotations

import torch

from visattn.geometry.layout import TokenLayout, Tokens, valid_keys
from visattn.inject.layers.call import Call, Plain

__all__ = ["Padding", "text_lengths_of"]


def text_lengths_of(call: Call, layout: TokenLayout, batch: int) -> torch.Tensor | None:
    """Return how many tokens of each text are valid, by the mask of a call, int64 ``[B, texts]``;
    None if there is no mask, or if it is no mask over the keys. This does not wait for the device.
    """
    mask = call.mask
    if mask is None or mask.dtype != torch.bool or not layout.texts:
        return None
    if mask.shape not in ((batch, 1, 1, layout.length), (1, 1, 1, layout.length)):
        return None
    counts = [mask[:, 0, 0, start : start + n].sum(-1) for start, n in layout.texts]
    return torch.stack(counts, 1).expand(batch, -1)


class Padding:
    """The tokens of a call without the padding of its text.

    Args:
        layout: layout of the call.
        lengths: ``text_lengths_of`` the call; reading them waits for the device.
        path: path of its layer.

    Raises:
        ValueError: the samples have texts of different lengths.

    Attributes:
        tokens: the tokens without padding.
        length: number of tokens with padding.
        kept: indices of the tokens without padding in the sequence with padding, int64 ``[L']``.
    """

    def __init__(self, layout: TokenLayout, lengths: torch.Tensor, path: str) -> None:
        different = lengths.unique(dim=0).tolist()
        if len(different) > 1:
            counts = " and ".join(str(sum(sample)) for sample in different)
            raise ValueError(
                f"cannot edit {path}: the prompts of this batch have {counts} valid tokens, and "
                "edits need equal lengths; use prompts of equal token length, or batch size 1"
            )
        text_lengths = iter(different[0])
        segments = (
            ("text", next(text_lengths)) if kind == "text" else (kind, *sizes)
            for kind, *sizes in layout.tokens
        )
        self.tokens: Tokens = tuple(segment for segment in segments if segment != ("text", 0))
        self.length = layout.length
        self.kept = valid_keys(lengths[:1], layout)[0].nonzero()[:, 0]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, H, L, D]`` without the padding."""
        return x.index_select(2, self.kept)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, H, L', D]`` with the padding, which is 0."""
        padded = x.new_zeros(*x.shape[:2], self.length, x.shape[3])
        return padded.index_copy(2, self.kept, x)

    def around(self, plain: Plain) -> Plain:
        """Return a function that computes the attention of tensors without padding. It adds the
        padding, runs ``plain``, which masks it, and removes it again. Parts without an edit stay
        bit-identical, because ``plain`` gets a sequence with padding, as without edits."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.cut(plain(*map(self.back, (q, k, v))))

        return attend
