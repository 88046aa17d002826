"""Let samples attend to the keys and values of other samples of the batch."""

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
    """The rotary position embedding of a denoiser. Of the ``n`` channels of an axis of the grid,
    the pair ``(2 i, 2 i + 1)`` of queries and keys is rotated by ``position * theta^(-2 i / n)``
    (RoPE, Su et al. 2021, arXiv 2104.09864).

    Args:
        channels: number of channels of a head for the frames, the height and the width. The
            channels follow each other in this order.
        theta: base of the frequencies.
    """

    channels: tuple[int, int, int]
    theta: float = 10000.0

    def moved(self, keys: torch.Tensor, shifts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the keys of a grid as they would be at other positions.

        Args:
            keys: keys with rotary positions, ``[..., T H W, D]``.
            shifts: shifts of the frames ``[T]``, rows ``[H]`` and columns ``[W]``, in tokens. They
                may be fractions. A shift of 0 leaves a key exactly as it is.

        Returns:
            The shifted keys, of the shape and dtype of ``keys``.

        Raises:
            ValueError: the keys have another head size.
        """
        if keys.shape[-1] != sum(self.channels):
            raise ValueError(
                f"keys have {keys.shape[-1]} channels and {self} has {sum(self.channels)}; give "
                "the denoiser that computes these keys"
            )
        sizes = [len(shift) for shift in shifts]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        tables: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for axis, (n, shift) in enumerate(zip(self.channels, shifts, strict=True)):
            rates = self.theta ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
            angle = shift.cpu().double()[:, None] * rates
            shape = [1, 1, 1, -1]
            shape[axis] = sizes[axis]
            for table, value in zip(tables, (angle.cos(), angle.sin()), strict=True):
                by_axis = value.to(device=keys.device, dtype=dtype).reshape(shape)
                table.append(by_axis.expand(*sizes, -1))
        cos, sin = (torch.cat(table, -1).flatten(0, 2) for table in tables)
        x, y = keys.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2).to(keys.dtype)


def rotary_of(pipe: Any) -> Rotary:
    """Return the rotary position embedding of a denoiser, or of the denoiser of a pipeline.

    Args:
        pipe: a pipeline or a denoiser.

    Raises:
        ValueError: the denoiser has no rotary position embedding of Wan or Flux.
    """
    denoiser = getattr(pipe, "transformer", pipe)
    module: Any
    for module in (getattr(denoiser, "rope", None), getattr(denoiser, "pos_embed", None)):
        if type(module).__name__ == "WanRotaryPosEmbed":
            per_side = 2 * (module.attention_head_dim // 6)
            return Rotary((module.attention_head_dim - 2 * per_side, per_side, per_side))
        if type(module).__name__ == "FluxPosEmbed":
            frames, height, width = module.axes_dim
            return Rotary((frames, height, width), float(module.theta))
    raise ValueError(
        f"{type(denoiser).__name__} has no rotary position embedding that visattn knows; keys can "
        "be moved for Wan and Flux"
    )


@dataclass(frozen=True, kw_only=True)
class ShareKV(Edit):
    """Let samples attend to the keys and values of another sample of their pass (DiTCtrl, Cai et
    al. 2024, arXiv 2412.18597). They take all tokens of the source, text tokens included.

    Args:
        source: index of the sample whose keys and values are used.
        what: ``both``, ``keys`` (the values stay the sample's own) or ``values``.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, a pass has no such
            sample.

    Example:
        >>> from visattn.guidance import ShareKV, steer
        >>> with steer(pipe, ShareKV(source=0, samples=[1], layers=[2])):
        ...     videos = pipe(["a red cat", "a blue cat"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

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
                old = getattr(state, name)
                new = old.clone()
                new[chosen] = torch.where(heads, old[source : source + 1], old[chosen])
                setattr(state, name, new)


@dataclass(frozen=True, kw_only=True, eq=False)
class BorrowKeys(Edit):
    """Let samples attend to tokens of other samples in addition to their own: one softmax runs over
    the keys of all (ConsiStory, Tewel et al. 2024, arXiv 2402.03286; StoryDiffusion, Zhou et al.
    2024, arXiv 2405.01434; DreamStory, He et al. 2024, arXiv 2407.12899). Borrowed keys keep the
    rotary positions of their own sample, unless ``keys`` gives others.

    The strength of a head multiplies the weight of a borrowed key relative to the sample's own
    keys.

    Args:
        sources: indices of the samples whose tokens are borrowed. A sample borrows none from
            itself.
        tokens: the image tokens of each source to borrow, bool ``[b, image tokens]``, or a function
            of a call's State that returns them. None means all image tokens.
        share: share of these tokens that is borrowed. They are drawn by ``seed`` and step (random
            sampling of StoryDiffusion, mask dropout of ConsiStory).
        seed: seed of the draw.
        keys: a function of a call's State that returns the keys ``[b, H, L, D]`` to borrow instead
            of the call's own, for example keys at other positions. None means the call's own.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, a pass has no such sample
            or ``tokens`` has another shape.

    Example:
        >>> from visattn.guidance import BorrowKeys, steer
        >>> with steer(pipe, BorrowKeys(sources=[0], samples=[1], share=0.5)):
        ...     videos = pipe(["a red cat", "a blue cat"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

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
                "BorrowKeys(attention='cross') is not possible: it borrows image tokens, and the "
                "keys of cross-attention are text; use attention='self'"
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
        source_keys = state.k if self.keys is None else self.keys(state)
        for sample in self.samples_in(state):
            keys, values = [], []
            for source in self.sources:
                if source == sample:
                    continue
                borrowed = (tokens[source].cpu() & drawn[source]).nonzero()[:, 0] + image.start
                borrowed = borrowed.to(state.k.device)
                keys.append(source_keys[source : source + 1, :, borrowed])
                values.append(state.v[source : source + 1, :, borrowed])
            if keys:
                receiver = torch.tensor([sample], device=state.k.device)
                k, v = torch.cat(keys, 2), torch.cat(values, 2)
                state.borrowed.append(Borrowed(receiver, k, v, strength))

    def _drawn(self, state: State, count: int) -> torch.Tensor:
        """Return whether a token of a sample is drawn, bool ``[b, image tokens]``. The draw is the
        same in all layers of a step."""
        if self.share == 1:
            return torch.ones(state.q.shape[0], count, dtype=torch.bool)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + (state.call.step or 0))
        order = torch.rand(state.q.shape[0], count, generator=random)
        return order < self.share
