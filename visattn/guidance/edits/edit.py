"""The base class of edits: a change at one stage of an attention call, and where it applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn._arguments import as_indices, check_window, is_integer, is_number
from visattn.guidance.edits.state import State, Stream
from visattn.guidance.head_set import Heads, HeadSet, Layers
from visattn.guidance.written_form import Writable
from visattn.plan import PASSES, ROLES

__all__ = ["STAGES", "Edit", "Where"]

STAGES = ("query", "keys", "bias", "kernel", "columns", "lerp", "output", "read")


@dataclass(frozen=True)
class Where:
    """The layers and heads of a denoiser that an edit applies to.

    Attributes:
        strengths: strengths of the heads, float32 ``[H]``, by the path of the layer.
    """

    strengths: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Edit(Writable):
    """Base class of edits of attention calls. A subclass sets ``stage`` and defines ``apply``. It
    also sets ``example`` if it has a text form.

    Args:
        layers: indices into the denoiser's layers of the kind ``attention`` (negative indices count
            from the end), their module paths, or a HeadSet, which gives layers and heads with
            strengths. None means all layers.
        heads: indices of heads, strengths from 0 to 1 by index, or one strength of all heads as a
            float. None means all heads at strength 1.
        attention: ``self`` (self-attention, or joint attention, where text is part of the sequence)
            or ``cross`` (cross-attention to text).
        stream: the query rows that change: ``all``, ``image`` (the image or video; with several
            grids the first one, which is generated) or ``text``.
        passes: some of ``cond``, ``uncond`` and ``perturbed``. None means all passes.
        samples: indices of the samples of a pass. None means all samples.
        start: the first step, as an int, or as a float share of the steps.
        stop: the step after the last one, as an int, or as a float share of the steps.
        role: the denoiser of a pipeline with two: ``transformer``, ``transformer_2`` or ``any``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> from visattn.guidance import Edit, steer
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Dampen(Edit):
        ...     factor: float = 0.5
        ...     stage = "output"
        ...     def apply(self, state, strength):
        ...         self.change(state, "out", state.out * self.factor, strength)
        >>> with steer(pipe, Dampen(layers=[1], heads=[0])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
    """

    layers: Layers | HeadSet = None
    heads: Heads = None
    attention: Literal["self", "cross"] = "self"
    stream: Stream = "all"
    passes: tuple[str, ...] | None = None
    samples: tuple[int, ...] | None = None
    start: int | float = 0
    stop: int | float = 1.0
    role: str = "any"

    stage: ClassVar[str]  # of STAGES
    streams: ClassVar[tuple[Stream, ...]] = ("all", "image", "text")  # allowed values of stream
    partial: ClassVar[bool] = True  # whether strengths of heads may lie between 0 and 1
    needs_lse: ClassVar[bool] = False  # whether ``apply`` reads ``state.lse``

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.attention not in ("self", "cross"):
            raise ValueError(f"{name}(attention={self.attention!r}) must be self or cross")
        if self.stream not in self.streams:
            raise ValueError(f"{name}(stream={self.stream!r}) must be {' or '.join(self.streams)}")
        if self.passes is not None:
            passes = (self.passes,) if isinstance(self.passes, str) else tuple(self.passes)
            if not passes or not set(passes) <= set(PASSES):
                raise ValueError(
                    f"{name}(passes={self.passes!r}) must be of {', '.join(PASSES)}; None means all"
                )
            object.__setattr__(self, "passes", passes)
        if self.samples is not None:
            samples = as_indices(f"{name}(samples=...)", self.samples)
            if not samples:
                raise ValueError(f"{name}(samples=()) names no sample; None means all")
            object.__setattr__(self, "samples", samples)
        check_window(name, self.start, self.stop)
        if self.role not in (*ROLES, "any"):
            raise ValueError(f"{name}(role={self.role!r}) must be one of {', '.join(ROLES)}, any")

    def place(self, paths: Sequence[str], heads: int) -> Where:
        """Return the layers and heads of a denoiser that the edit applies to.

        Args:
            paths: paths of the denoiser's attention layers of the kind ``attention``.
            heads: number of heads in a layer.

        Raises:
            ValueError: the denoiser has no such layer or head, or the edit does not allow the
                strength of a head.
        """
        where = self._place(paths, heads)
        if not self.partial and any(
            bool(((strength > 0) & (strength < 1)).any()) for strength in where.strengths.values()
        ):
            raise ValueError(
                f"{type(self).__name__} edits whole heads; give heads strengths of 0 or 1"
            )
        return where

    def _place(self, paths: Sequence[str], heads: int) -> Where:
        name = type(self).__name__
        if isinstance(self.layers, HeadSet):
            if self.heads is not None:
                raise ValueError(f"{name} has heads and a HeadSet, so leave heads out")
            by_path = {
                _path(name, path, paths): _strengths(name, strengths, heads) * self.layers.strength
                for path, strengths in self.layers.layers.items()
            }
            return Where(by_path)
        layers = self.layers
        if layers is None:
            chosen = list(paths)
        elif isinstance(layers, (int, str)):
            chosen = [_path(name, layers, paths)]
        elif isinstance(layers, Sequence):
            chosen = [_path(name, layer, paths) for layer in layers]
        else:
            raise TypeError(
                f"{name}(layers={layers!r}) must be numbers or paths of layers, a HeadSet, or None"
            )
        if not chosen:
            raise ValueError(f"{name}(layers={layers!r}) names no layer; None means all")
        strengths = _strengths(name, self.heads, heads)
        return Where(dict.fromkeys(chosen, strengths))

    def apply(self, state: State, strength: torch.Tensor) -> None:
        """Change an attention call at the stage of the edit.

        Args:
            state: one pass of the call, as the earlier stages left it.
            strength: strengths of the heads, ``[H]``.
        """
        raise NotImplementedError

    def samples_in(self, state: State) -> list[int]:
        """Return the indices of the samples that the edit applies to.

        Args:
            state: one pass of an attention call.

        Raises:
            ValueError: the pass has no such sample.
        """
        batch = range(state.q.shape[0])
        if self.samples is None:
            return list(batch)
        for sample in self.samples:
            if sample not in batch:
                raise ValueError(
                    f"{type(self).__name__} edits sample {sample}, and a pass of this call has "
                    f"{len(batch)} samples, from 0 on; give more prompts"
                )
        return list(self.samples)

    def check_source(self, state: State, sample: int) -> None:
        """Check that a pass has the source sample of the edit.

        Args:
            state: one pass of an attention call.
            sample: index of the source sample.

        Raises:
            ValueError: the pass has no such sample.
        """
        if not 0 <= sample < state.q.shape[0]:
            raise ValueError(
                f"{type(self).__name__} takes from sample {sample}, and a pass of "
                f"{state.call.layer} has {state.q.shape[0]} samples, from 0 on; give more prompts"
            )

    def change(self, state: State, name: str, new: torch.Tensor, strength: torch.Tensor) -> None:
        """Interpolate a tensor of a call towards another one by the strength of each head, in the
        samples and rows of the edit. At strength 1 the result is exactly the other tensor.

        Args:
            state: the call. Its tensor ``name`` is replaced.
            name: ``q`` or ``out``, each ``[b, H, Lq, D]``.
            new: the tensor at strength 1, of a shape that broadcasts to the old one.
            strength: strengths of the heads, ``[H]`` or ``[b, H]``.
        """
        old = getattr(state, name)
        weight = strength.expand(len(old), -1)
        samples = torch.tensor(self.samples_in(state))[:, None]
        heads = weight.any(0).nonzero()[None, :, 0]  # heads of strength 0 are skipped
        if not samples.numel() or not heads.numel():
            return
        share = weight[samples, heads].to(device=old.device, dtype=old.dtype)[..., None, None]
        samples, heads = samples.to(old.device), heads.to(old.device)
        out = old.clone()
        for rows in state.rows(self.stream):
            before, after = (x[samples, heads, rows] for x in (old, new.expand_as(old)))
            moved = torch.where(share == 1, after, torch.lerp(before, after, share))
            out[samples, heads, rows] = torch.where(share == 0, before, moved)
        setattr(state, name, out)


def _path(name: str, layer: int | str, paths: Sequence[str]) -> str:
    if is_integer(layer):
        if -len(paths) <= layer < len(paths):
            return paths[layer]
        raise ValueError(f"{name} names layer {layer}; there are {len(paths)}, from 0 on")
    if layer in paths:
        return str(layer)
    raise ValueError(
        f"{name} names the layer {layer!r}; the attention layers are {', '.join(paths[:3])}..."
    )


def _strengths(name: str, heads: Heads, count: int) -> torch.Tensor:
    if heads is None:
        return torch.ones(count)
    if isinstance(heads, float):
        heads = dict.fromkeys(range(count), heads)
    if not isinstance(heads, Mapping):
        heads = dict.fromkeys(as_indices(f"{name}(heads=...)", heads), 1.0)
    out = torch.zeros(count)
    for head, strength in heads.items():
        if not is_integer(head) or not 0 <= head < count:
            raise ValueError(f"{name} names head {head!r}; a layer has {count} heads, from 0 on")
        if not is_number(strength):
            raise TypeError(f"{name} has the strength {strength!r}; it must be a number, 0 to 1")
        if not 0 <= strength <= 1:
            raise ValueError(f"{name} has the strength {strength!r}; it must be from 0 to 1")
        out[head] = float(strength)
    return out
