"""Padding of the text in a call of attention: by its mask as lengths, and cut away."""

from __future__ import annotations

import torch

from visattn.geometry.layout import TokenLayout, Tokens, valid_keys
from visattn.inject.layers.call import Call, Plain

__all__ = ["Padding", "text_lengths_of"]


def text_lengths_of(call: Call, layout: TokenLayout, batch: int) -> torch.Tensor | None:
    """Valid tokens of each text by the mask of a call, int64 ``[B, texts]``; None where the call
    has no mask, or one that is not of keys. Nothing waits for a device."""
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
        layout: of the call; lengths: ``text_lengths_of`` it, which are read.
        path: of its layer.

    Raises:
        ValueError: the samples have texts of different lengths.

    Attributes:
        tokens: those that are left; kept: where they are, int64 ``[L']``, of ``length``.
    """

    def __init__(self, layout: TokenLayout, lengths: torch.Tensor, path: str) -> None:
        each = lengths.unique(dim=0).tolist()
        if len(each) > 1:
            found = " and ".join(str(sum(own)) for own in each)
            raise ValueError(
                f"an edit of {path} is of a batch whose texts have {found} valid tokens, and it "
                "can be made of texts of one length; give prompts of as many tokens, or one at a "
                "time"
            )
        left = iter(each[0])
        every = (
            ("text", next(left)) if kind == "text" else (kind, *sizes)
            for kind, *sizes in layout.tokens
        )
        self.tokens: Tokens = tuple(own for own in every if own != ("text", 0))
        self.length = layout.length
        self.kept = valid_keys(lengths[:1], layout)[0].nonzero()[:, 0]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, L, D]`` without the padding."""
        return x.index_select(2, self.kept)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, L', D]`` with the padding, which is 0."""
        whole = x.new_zeros(*x.shape[:2], self.length, x.shape[3])
        return whole.index_copy(2, self.kept, x)

    def around(self, plain: Plain) -> Plain:
        """Attention of tensors without the padding by ``plain``, which masks it: what no edit
        changes stays the same to the bit."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.cut(plain(*map(self.back, (q, k, v))))

        return attend
