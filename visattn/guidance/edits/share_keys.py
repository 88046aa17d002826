"""Keys and values of other samples of the batch, or kept from elsewhere (P3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import POSITIVE_SHARE, as_indices, check_number
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import Borrowed, State, Stream

__all__ = ["BorrowKeys", "Rotary", "ShareKV", "rotary_of"]


@dataclass(frozen=True)
class Rotary:
    """How a denoiser rotates queries and keys by their place in the grid: of the ``n`` channels of
    an axis, the pair ``(2 i, 2 i + 1)`` by ``place * theta^(-2 i / n)`` (RoPE, Su et al. 2021,
    arXiv 2104.09864).

    Args:
        channels: of a head for the frames, the height and the width, one after the other.
        theta: the base of the frequencies.
    """

    channels: tuple[int, int, int]
    theta: float = 10000.0

    def moved(self, keys: torch.Tensor, shifts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Keys of a grid as they are at other places, ``[..., T H W, D]``: rotated on by the
        difference.

        Args:
            keys: rotated ones, ``[..., T H W, D]``.
            shifts: of the frames ``[T]``, rows ``[H]`` and columns ``[W]`` in tokens, fractions
                too; 0 changes no bit.

        Raises:
            ValueError: the heads are of another size.
        """
        if keys.shape[-1] != sum(self.channels):
            raise ValueError(
                f"keys have {keys.shape[-1]} channels and {self} has {sum(self.channels)}; give "
                "the denoiser whose keys they are"
            )
        sizes = [len(own) for own in shifts]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        tables: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for axis, (n, own) in enumerate(zip(self.channels, shifts, strict=True)):
            rates = self.theta ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
            angle = own.cpu().double()[:, None] * rates
            shape = [1, 1, 1, -1]
            shape[axis] = sizes[axis]
            for table, value in zip(tables, (angle.cos(), angle.sin()), strict=True):
                wide = value.to(device=keys.device, dtype=dtype).reshape(shape)
                table.append(wide.expand(*sizes, -1))
        cos, sin = (torch.cat(table, -1).flatten(0, 2) for table in tables)
        x, y = keys.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2).to(keys.dtype)


def rotary_of(pipe: Any) -> Rotary:
    """The rotary positions of a denoiser, or of that of a pipeline.

    Raises:
        ValueError: it has none, or others than those of Wan and Flux.
    """
    denoiser = getattr(pipe, "transformer", pipe)
    own: Any
    for own in (getattr(denoiser, "rope", None), getattr(denoiser, "pos_embed", None)):
        if type(own).__name__ == "WanRotaryPosEmbed":
            each = 2 * (own.attention_head_dim // 6)
            return Rotary((own.attention_head_dim - 2 * each, each, each))
        if type(own).__name__ == "FluxPosEmbed":
            frames, height, width = own.axes_dim
            return Rotary((frames, height, width), float(own.theta))
    raise ValueError(
        f"{type(denoiser).__name__} has no rotary positions that are known; keys are moved with "
        "those of Wan and Flux"
    )


@dataclass(frozen=True, kw_only=True)
class ShareKV(Edit):
    """Samples attend to the keys and values of another sample of their pass (DiTCtrl, Cai et al.
    2024, arXiv 2412.18597).

    Args:
        source: whose; samples: who do.
        what: ``both``, ``keys`` (values stay their own) or ``values``.

    All of the source's tokens are taken, its text too.

    Source:
        Cai et al. (2024), "DiTCtrl", arXiv 2412.18597. Code: github.com/TencentARC/DiTCtrl (commit
        f1348b5).
    Default:
        code.
    Differences:
        none
    """

    source: int
    what: Literal["both", "keys", "values"] = "both"
    stage: ClassVar[str] = "keys"
    streams: ClassVar[tuple[Stream, ...]] = ("all",)
    partial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("both", "keys", "values"):
            raise ValueError(f"ShareKV(what={self.what!r}) must be both, keys or values")
        as_indices("ShareKV(source=...)", self.source)

    def apply(self, state: State, strength: torch.Tensor) -> None:
        chosen = self.samples_in(state)
        source = self.source
        self.check_source(state, source)
        heads = (strength > 0).to(state.k.device)[None, :, None, None]
        for name in ("k", "v"):
            if self.what in ("both", "keys" if name == "k" else "values"):
                own = getattr(state, name)
                new = own.clone()
                new[chosen] = torch.where(heads, own[source : source + 1], own[chosen])
                setattr(state, name, new)


@dataclass(frozen=True, kw_only=True, eq=False)
class BorrowKeys(Edit):
    """Samples attend to tokens of other samples beside their own: the keys are put together, and
    the softmax is over all of them (ConsiStory, Tewel et al. 2024, arXiv 2402.03286;
    StoryDiffusion, Zhou et al. 2024, arXiv 2405.01434; DreamStory, He et al. 2024, arXiv
    2407.12899). Keys carry the rotary positions that they have in their own sample, unless others
    are given.

    Args:
        sources: the samples that tokens are taken from; a sample takes none from itself.
        tokens: which image tokens of each source are taken, bool ``[b, tokens of the image]``, or a
            function of the call that gives them; None: all of them.
        share: of the tokens that are there, this share is drawn, by ``seed`` and step (random
            sampling of StoryDiffusion, mask dropout of ConsiStory).
        keys: a function of the call that gives the keys ``[b, H, L, D]`` which are borrowed in
            place of its own, as at other positions (``Rotary``).

    The strength of a head is what a borrowed key weighs beside one of its own.

    Source:
        Tewel et al. (2024), "Training-Free Consistent Text-to-Image Generation", arXiv 2402.03286;
        Zhou et al. (2024), "StoryDiffusion", arXiv 2405.01434; He et al. (2024), "DreamStory",
        arXiv 2407.12899.
    Default:
        paper.
    Differences:
        - Keys keep the rotary positions of their own sample; the papers are for UNets, which have
          none.
    """

    sources: tuple[int, ...]
    tokens: object = None
    share: float = 1.0
    seed: int = 0
    keys: Callable[[State], torch.Tensor] | None = None
    stage: ClassVar[str] = "keys"
    streams: ClassVar[tuple[Stream, ...]] = ("all",)
    needs_lse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention != "self":
            raise ValueError(
                "BorrowKeys(attention='cross') is not possible: it takes tokens of the image, and "
                "the keys of cross-attention are text; take attention='self'"
            )
        object.__setattr__(self, "sources", as_indices("BorrowKeys(sources=...)", self.sources))
        check_number("BorrowKeys", "share", self.share, *POSITIVE_SHARE)

    def apply(self, state: State, strength: torch.Tensor) -> None:
        image = state.image
        tokens = self.tokens(state) if callable(self.tokens) else self.tokens
        count = image.stop - image.start
        if tokens is None:
            tokens = torch.ones(state.q.shape[0], count, dtype=torch.bool)
        if (
            not isinstance(tokens, torch.Tensor)
            or tokens.dtype != torch.bool
            or tokens.shape != (state.q.shape[0], count)
        ):
            shape, dtype = (getattr(tokens, name, None) for name in ("shape", "dtype"))
            raise ValueError(
                f"BorrowKeys(tokens=...) has the shape {list(shape or ())} and the dtype {dtype}; "
                f"it must be bool, and {state.call.layer} has {state.q.shape[0]} samples of "
                f"{count} image tokens"
            )
        for source in self.sources:
            self.check_source(state, source)
        drawn = self._drawn(state, count)
        given = state.k if self.keys is None else self.keys(state)
        for sample in self.samples_in(state):
            keys, values = [], []
            for source in self.sources:
                if source == sample:
                    continue
                at = (tokens[source].cpu() & drawn[source]).nonzero()[:, 0] + image.start
                at = at.to(state.k.device)
                keys.append(given[source : source + 1, :, at])
                values.append(state.v[source : source + 1, :, at])
            if keys:
                mine = torch.tensor([sample], device=state.k.device)
                k, v = torch.cat(keys, 2), torch.cat(values, 2)
                state.borrowed.append(Borrowed(mine, k, v, strength))

    def _drawn(self, state: State, count: int) -> torch.Tensor:
        """Which tokens of each sample are drawn, bool ``[b, tokens]``: the same in all layers of a
        step."""
        if self.share == 1:
            return torch.ones(state.q.shape[0], count, dtype=torch.bool)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + (state.call.step or 0))
        order = torch.rand(state.q.shape[0], count, generator=random)
        return order < self.share
