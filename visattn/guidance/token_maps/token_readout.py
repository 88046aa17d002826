"""Maps of text tokens, collected over layers, passes and steps, and masks from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from visattn._arguments import is_integer
from visattn.guidance.edits.read_tokens import Reading
from visattn.guidance.edits.state import State

__all__ = ["Threshold", "TokenReadout", "When", "frame_minmax", "otsu", "token_masks"]

Normalise = Literal["raw", "real"]
When = Literal["now", "before"]
Threshold = float | Literal["otsu"]


@dataclass
class _Sum:
    """What readings of one pass of one step add up to."""

    columns: torch.Tensor
    real: torch.Tensor | None
    count: int
    like: Reading


class TokenReadout:
    """The sink of ``ReadTokens``: means over layers, by pass and step.

    Args:
        keep: how many of the last steps are kept; default: all.

    A generation that begins anew at an earlier step replaces what there was. What it holds are
    ``[samples, image tokens, tokens]`` for each pass and step.
    """

    def __init__(self, keep: int | None = None) -> None:
        if keep is not None and (not is_integer(keep) or keep < 1):
            raise ValueError(f"TokenReadout(keep={keep!r}) must be a number of steps; None is all")
        self.keep = keep
        self._sums: dict[tuple[int | None, str | None], _Sum] = {}

    def __call__(self, reading: Reading) -> None:
        """Take a reading in."""
        step = reading.step
        if step is not None and any(known is None or known > step for known, _ in self._sums):
            self._sums.clear()
        key = step, reading.pass_
        columns = reading.columns.detach()
        real = None if reading.real is None else reading.real.detach()
        own = self._sums.get(key)
        if own is None:
            self._sums[key] = _Sum(columns.clone(), real, 1, reading)
            self._forget()
            return
        if own.columns.shape != columns.shape or own.like.samples != reading.samples:
            raise ValueError(
                f"TokenReadout has maps of the shape {list(own.columns.shape)}, and "
                f"{reading.layer} gives {list(columns.shape)}; read these with another TokenReadout"
            )
        own.columns += columns
        own.real = None if own.real is None or real is None else own.real + real
        own.count += 1

    def clear(self) -> None:
        """Forget all maps."""
        self._sums.clear()

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The steps that there are maps of, in order."""
        return tuple(dict.fromkeys(step for step, _ in self._sums))

    @property
    def passes(self) -> tuple[str | None, ...]:
        """The passes that there are maps of."""
        return tuple(dict.fromkeys(pass_ for _, pass_ in self._sums))

    def maps(
        self,
        pass_: str | None = "cond",
        step: int | None = None,
        normalise: Normalise = "raw",
    ) -> torch.Tensor:
        """What image tokens attend to the tokens with.

        Args:
            pass_: whose; None for a denoiser that was called alone.
            step: negative ones count from the last; default: the mean over all that are kept.
            normalise: ``raw``: columns of the attention, ``real``: divided by what the image token
                attends to all real tokens with (``ReadTokens(real=...)``), so that in joint
                attention they are comparable to those of cross-attention.

        Returns:
            ``[samples, tokens, frames, height, width]``, float32 (float64 for float64).

        Raises:
            ValueError: there are no such maps.
        """
        steps = self.steps
        if step is not None and step < 0 and -step <= len(steps):
            step = steps[step]
        found = [
            own
            for (at, whose), own in self._sums.items()
            if whose == pass_ and (step is None or at == step)
        ]
        if not found:
            raise ValueError(
                f"there are no maps of the {pass_} pass"
                + ("" if step is None else f" at step {step}")
                + f"; there are those of {', '.join(map(str, self.passes)) or 'none'} at the steps "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        return torch.stack([_maps(own, normalise) for own in found]).mean(0)

    def masks(
        self,
        token: int = 0,
        threshold: Threshold = 0.3,
        *,
        when: When = "before",
        pass_: str = "cond",
    ) -> Callable[[State], torch.Tensor]:
        """Where the image is of a token, for ``BorrowKeys(tokens=...)`` and the like (mask-guided
        sharing, DiTCtrl, Cai et al. 2024, arXiv 2412.18597).

        Args:
            token: which of the tokens (or groups of them) that are read, from 0.
            threshold: of the map, which is scaled from 0 to 1 in each frame; ``otsu``: the one that
                sets the values of the map's tokens, unscaled, best apart (``otsu``).
            when: ``before``: by all layers of the step before, so that the edit begins a step later
                than the readout; ``now``: by the layers of the step that ran already, so that it is
                in later layers.
            pass_: whose maps; they serve all passes.

        Returns:
            A function of a call's State that gives bool ``[b, image tokens]``; samples that were
            not read have none.
        """
        _check_when(when)

        def masks(state: State) -> torch.Tensor:
            maps, like = self._at(state, when, pass_)
            _check_token(token, maps)
            own = token_masks(maps[:, token], threshold).flatten(1)
            out = torch.zeros(like.batch, own.shape[1], dtype=torch.bool, device=own.device)
            out[list(like.samples)] = own
            return out

        return masks

    def labels(
        self, threshold: float = 0.3, *, when: When = "before", pass_: str = "cond"
    ) -> Callable[[State], torch.Tensor]:
        """Which token each query is of, for ``LabelBias(q_labels=...)``: of the tokens whose mask
        it is in that with the largest scaled map, counted from 1; 0 for background and text.

        Returns:
            A function of a call's State that gives int64 ``[b, Lq]``. Arguments as ``masks``.
        """
        _check_when(when)

        def labels(state: State) -> torch.Tensor:
            maps, like = self._at(state, when, pass_)
            scaled = frame_minmax(maps).flatten(2)  # [samples, tokens, image tokens]
            largest, token = scaled.max(1)
            own = torch.where(largest >= threshold, token + 1, 0)
            out = torch.zeros(like.batch, state.q.shape[2], dtype=torch.int64, device=own.device)
            out[list(like.samples), state.image] = own
            return out

        return labels

    def _at(self, state: State, when: When, pass_: str) -> tuple[torch.Tensor, Reading]:
        """The maps of the step of a call or of the one before."""
        step = state.call.step
        if step is None:
            raise ValueError(
                "masks from a readout go by steps, and the step of this call is not known; steer "
                "the pipeline that runs"
            )
        own = self._sums.get((step if when == "now" else step - 1, pass_))
        if own is None:
            remedy = "in later layers than those read" if when == "now" else "at a later step"
            raise ValueError(
                f"there is no readout of the {pass_} pass for {state.call.layer} at step {step} "
                f"yet; let the edit begin {remedy}"
            )
        grid = state.call.layout.grids[0][1]
        if grid != own.like.grid or state.q.shape[0] != own.like.batch:
            raise ValueError(
                f"the readout is of {own.like.batch} samples of {own.like.grid} tokens, and "
                f"{state.call.layer} has {state.q.shape[0]} of {grid}"
            )
        return _maps(own, "raw"), own.like

    def _forget(self) -> None:
        """Let go of steps that are not to be kept."""
        for step in self.steps[: -self.keep] if self.keep else ():
            for key in [key for key in self._sums if key[0] == step]:
                del self._sums[key]


def _maps(own: _Sum, normalise: Normalise) -> torch.Tensor:
    """``[samples, tokens, T, H, W]``."""
    if normalise not in ("raw", "real"):
        raise ValueError(f"normalise={normalise!r} must be raw or real")
    if normalise == "raw":
        maps = own.columns / own.count
    elif own.real is None:
        raise ValueError(
            "normalise='real' needs the numbers of the real tokens; give ReadTokens(real=...)"
        )
    else:
        maps = own.columns / own.real[..., None].clamp_min(torch.finfo(own.real.dtype).tiny)
    found: torch.Tensor = maps.mT.unflatten(2, own.like.grid.shape)
    return found


def frame_minmax(maps: torch.Tensor) -> torch.Tensor:
    """Maps ``[..., frames, height, width]`` scaled from 0 to 1 in each frame; 0 where a frame is
    all alike."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def token_masks(maps: torch.Tensor, threshold: Threshold) -> torch.Tensor:
    """Where maps ``[..., frames, height, width]``, scaled in each frame, reach a threshold; bool of
    the same shape. ``otsu``: where they reach that of ``otsu``, unscaled."""
    if threshold == "otsu":
        return maps >= otsu(maps.flatten(-3))[..., None, None, None]
    return frame_minmax(maps) >= threshold


def otsu(values: torch.Tensor) -> torch.Tensor:
    """The least value of the upper class when values ``[..., n]`` are split in two with the largest
    variance between the classes (Otsu 1979); ``[...]``. Every split is tried, so that there are no
    bins."""
    ordered = values.double().sort(-1).values
    n = ordered.shape[-1]
    if n < 2:
        return values[..., 0]
    below = torch.arange(1, n, device=values.device)
    sums = ordered.cumsum(-1)
    low = sums[..., :-1] / below
    high = (sums[..., -1:] - sums[..., :-1]) / (n - below)
    between = below * (n - below) * (high - low).square()
    at = between.argmax(-1, keepdim=True) + 1
    return ordered.gather(-1, at)[..., 0].to(values.dtype)


def _check_when(when: str) -> None:
    if when not in ("now", "before"):
        raise ValueError(f"when={when!r} must be now or before")


def _check_token(token: int, maps: torch.Tensor) -> None:
    if not 0 <= token < maps.shape[1]:
        raise ValueError(f"token={token} is not one of the {maps.shape[1]} that are read, from 0")
