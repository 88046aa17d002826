"""Maps of text tokens as means over layers, by pass and step, and masks from them."""

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
    """The sum of the readings of one pass of one step.

    Attributes:
        columns: sum of the columns, ``[samples, image tokens, tokens]``.
        real: sum of the weights of the real tokens, ``[samples, image tokens]``, or None.
        count: number of readings.
        first: the first of the readings.
    """

    columns: torch.Tensor
    real: torch.Tensor | None
    count: int
    first: Reading


class TokenReadout:
    """Collect the readings of ``ReadTokens`` as maps of the text tokens: means over layers, by pass
    and step.

    A generation that starts again at an earlier step replaces the maps. The memory is that of
    ``[samples, image tokens, tokens]`` for each pass and step.

    Args:
        keep: number of the last steps to keep. None means all steps.

    Raises:
        ValueError: ``keep`` is no positive integer.

    Example:
        >>> from visattn.guidance import ReadTokens, TokenReadout, steer
        >>> readout = TokenReadout()
        >>> with steer(pipe, ReadTokens(tokens=[0, 1], sink=readout, attention="cross")):
        ...     video = pipe("red square", height=32, width=32, num_frames=5,
        ...                  num_inference_steps=2)
        >>> readout.steps, readout.passes
        ((0, 1), ('cond', 'uncond'))
        >>> readout.maps("cond", step=-1).shape  # samples, tokens, frames, height, width
        torch.Size([1, 2, 2, 2, 2])
    """

    def __init__(self, keep: int | None = None) -> None:
        if keep is not None and (not is_integer(keep) or keep < 1):
            raise ValueError(f"TokenReadout(keep={keep!r}) must be a number of steps, or None")
        self.keep = keep
        self._sums: dict[tuple[int | None, str | None], _Sum] = {}

    def __call__(self, reading: Reading) -> None:
        """Add a reading."""
        step = reading.step
        if step is not None and any(known is None or known > step for known, _ in self._sums):
            self._sums.clear()
        key = step, reading.pass_
        columns = reading.columns.detach()
        real = None if reading.real is None else reading.real.detach()
        collected = self._sums.get(key)
        if collected is None:
            self._sums[key] = _Sum(columns.clone(), real, 1, reading)
            self._drop_old_steps()
            return
        old = collected.columns
        if old.shape != columns.shape or collected.first.samples != reading.samples:
            raise ValueError(
                f"TokenReadout has maps of the shape {list(old.shape)}, and {reading.layer} gives "
                f"{list(columns.shape)}; read these with another TokenReadout"
            )
        collected.columns += columns
        collected.real = (
            None if collected.real is None or real is None else collected.real + real
        )
        collected.count += 1

    def clear(self) -> None:
        """Remove all maps."""
        self._sums.clear()

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The steps that have maps, in the order in which they ran."""
        return tuple(dict.fromkeys(step for step, _ in self._sums))

    @property
    def passes(self) -> tuple[str | None, ...]:
        """The passes that have maps."""
        return tuple(dict.fromkeys(pass_ for _, pass_ in self._sums))

    def maps(
        self,
        pass_: str | None = "cond",
        step: int | None = None,
        normalise: Normalise = "raw",
    ) -> torch.Tensor:
        """Return the attention of image tokens to the text tokens.

        Args:
            pass_: name of the pass. None for a denoiser that was called without a pipeline.
            step: index of a step. Negative indices count from the last kept step. None means the
                mean over all kept steps.
            normalise: ``raw`` for columns of the attention map, or ``real`` for these divided by
                the attention of the image token to all real tokens (``ReadTokens(real=...)``),
                which makes maps of joint attention comparable to those of cross-attention.

        Returns:
            The maps ``[samples, tokens, frames, height, width]``, float32 (float64 for float64).

        Raises:
            ValueError: there are no such maps.
        """
        steps = self.steps
        if step is not None and step < 0 and -step <= len(steps):
            step = steps[step]
        sums = [
            collected
            for (sum_step, sum_pass), collected in self._sums.items()
            if sum_pass == pass_ and (step is None or sum_step == step)
        ]
        if not sums:
            raise ValueError(
                f"there are no maps of the {pass_} pass"
                + ("" if step is None else f" at step {step}")
                + f"; there are maps of the passes {', '.join(map(str, self.passes)) or 'none'} "
                f"at the steps {', '.join(map(str, steps)) or 'none'}"
            )
        return torch.stack([_maps(collected, normalise) for collected in sums]).mean(0)

    def masks(
        self,
        token: int = 0,
        threshold: Threshold = 0.3,
        *,
        when: When = "before",
        pass_: str = "cond",
    ) -> Callable[[State], torch.Tensor]:
        """Return a function that gives the mask of a token, for ``BorrowKeys(tokens=...)`` and the
        like (mask-guided sharing, DiTCtrl, Cai et al. 2024, arXiv 2412.18597).

        Args:
            token: index of the token (or group of tokens) among those that are read.
            threshold: threshold of the map, which is scaled from 0 to 1 in each frame, or ``otsu``
                for Otsu's threshold of the unscaled map.
            when: ``before`` for maps of all layers of the previous step (the edit must then start a
                step later than the readout), or ``now`` for maps of the layers of the current step
                that already ran (the edit must then be in later layers).
            pass_: the pass whose maps are used. They serve all passes.

        Returns:
            A function of a call's State that returns bool ``[b, image tokens]``. Samples that were
            not read have empty masks.

        Raises:
            ValueError: ``when`` has another value.
        """
        _check_when(when)

        def masks(state: State) -> torch.Tensor:
            maps, reading = self._maps_for(state, when, pass_)
            _check_token(token, maps)
            mask = token_masks(maps[:, token], threshold).flatten(1)
            out = torch.zeros(reading.batch, mask.shape[1], dtype=torch.bool, device=mask.device)
            out[list(reading.samples)] = mask
            return out

        return masks

    def labels(
        self, threshold: float = 0.3, *, when: When = "before", pass_: str = "cond"
    ) -> Callable[[State], torch.Tensor]:
        """Return a function that labels each query by its token, for ``LabelBias(q_labels=...)``.

        The label is 1 plus the index of the token whose scaled map is the largest at the query, if
        it reaches the threshold. Background and text have the label 0.

        Args:
            threshold: threshold of the maps, which are scaled from 0 to 1 in each frame.
            when: ``before`` or ``now``, as in ``masks``.
            pass_: the pass whose maps are used.

        Returns:
            A function of a call's State that returns int64 ``[b, Lq]``.

        Raises:
            ValueError: ``when`` has another value.
        """
        _check_when(when)

        def labels(state: State) -> torch.Tensor:
            maps, reading = self._maps_for(state, when, pass_)
            scaled = frame_minmax(maps).flatten(2)  # [samples, tokens, image tokens]
            largest, token = scaled.max(1)
            label = torch.where(largest >= threshold, token + 1, 0)
            length = state.q.shape[2]
            out = torch.zeros(reading.batch, length, dtype=torch.int64, device=label.device)
            out[list(reading.samples), state.image] = label
            return out

        return labels

    def _maps_for(self, state: State, when: When, pass_: str) -> tuple[torch.Tensor, Reading]:
        """Return the maps of the step of a call, or of the previous step, and one of their
        readings."""
        step = state.call.step
        if step is None:
            raise ValueError(
                "masks from a readout need the step of the call, which is not known; steer the "
                "pipeline that runs"
            )
        collected = self._sums.get((step if when == "now" else step - 1, pass_))
        if collected is None:
            remedy = "in later layers than those read" if when == "now" else "at a later step"
            raise ValueError(
                f"there is no readout of the {pass_} pass for {state.call.layer} at step {step} "
                f"yet; start the edit {remedy}"
            )
        grid = state.call.layout.grids[0][1]
        reading = collected.first
        if grid != reading.grid or state.q.shape[0] != reading.batch:
            raise ValueError(
                f"the readout has {reading.batch} samples of {reading.grid} tokens, and "
                f"{state.call.layer} has {state.q.shape[0]} of {grid}"
            )
        return _maps(collected, "raw"), reading

    def _drop_old_steps(self) -> None:
        """Remove all but the last ``keep`` steps."""
        for step in self.steps[: -self.keep] if self.keep else ():
            for key in [key for key in self._sums if key[0] == step]:
                del self._sums[key]


def _maps(collected: _Sum, normalise: Normalise) -> torch.Tensor:
    """Return the mean maps ``[samples, tokens, frames, height, width]``."""
    if normalise not in ("raw", "real"):
        raise ValueError(f"normalise={normalise!r} must be raw or real")
    if normalise == "raw":
        columns = collected.columns / collected.count
    elif collected.real is None:
        raise ValueError(
            "normalise='real' needs the indices of the real tokens; give ReadTokens(real=...)"
        )
    else:
        smallest = torch.finfo(collected.real.dtype).tiny
        columns = collected.columns / collected.real[..., None].clamp_min(smallest)
    maps: torch.Tensor = columns.mT.unflatten(2, collected.first.grid.shape)
    return maps


def frame_minmax(maps: torch.Tensor) -> torch.Tensor:
    """Scale maps ``[..., frames, height, width]`` from 0 to 1 in each frame. Constant frames become
    0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def token_masks(maps: torch.Tensor, threshold: Threshold) -> torch.Tensor:
    """Return whether maps reach a threshold.

    Args:
        maps: maps ``[..., frames, height, width]``.
        threshold: threshold of the maps scaled from 0 to 1 in each frame, or ``otsu`` for Otsu's
            threshold of the unscaled maps.

    Returns:
        bool, of the shape of ``maps``.
    """
    if threshold == "otsu":
        return maps >= otsu(maps.flatten(-3))[..., None, None, None]
    return frame_minmax(maps) >= threshold


def otsu(values: torch.Tensor) -> torch.Tensor:
    """Return Otsu's threshold (Otsu 1979): the smallest value of the upper class when values are
    split into two classes with the largest variance between them. Every split is tried, without
    bins.

    Args:
        values: values ``[..., n]``.

    Returns:
        The thresholds ``[...]``.
    """
    ordered = values.double().sort(-1).values
    n = ordered.shape[-1]
    if n < 2:
        return values[..., 0]
    below = torch.arange(1, n, device=values.device)
    sums = ordered.cumsum(-1)
    low = sums[..., :-1] / below
    high = (sums[..., -1:] - sums[..., :-1]) / (n - below)
    between = below * (n - below) * (high - low).square()
    split = between.argmax(-1, keepdim=True) + 1
    return ordered.gather(-1, split)[..., 0].to(values.dtype)


def _check_when(when: str) -> None:
    if when not in ("now", "before"):
        raise ValueError(f"when={when!r} must be now or before")


def _check_token(token: int, maps: torch.Tensor) -> None:
    if not 0 <= token < maps.shape[1]:
        raise ValueError(f"token={token} must be from 0 to {maps.shape[1] - 1}, the tokens read")
