"""Settings of updates of the latents by the gradient of a loss of token maps: the general form,
A-STAR, and Attend-and-Excite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from visattn._arguments import as_indices, in_window, is_number
from visattn.guidance.edits.read_tokens import TextTokens, groups_of
from visattn.guidance.head_set import Heads, HeadSet, Layers
from visattn.guidance.token_maps.losses import (
    SIGMA,
    astar_retention,
    astar_segregation,
    attend_and_excite,
)
from visattn.guidance.token_maps.token_readout import token_masks

__all__ = ["AStar", "AttendAndExcite", "LatentUpdate", "Loss"]

Loss = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentUpdate:
    """Update the latents before a step by the gradient of a loss of token maps: ``z <- z - a
    dL/dz``. ``update_latents`` applies it to a pipeline.

    Args:
        tokens: indices of text tokens, each of which gives a map. A group of indices gives one map,
            the sum of its tokens.
        loss: a function of the maps ``[samples, tokens, frames, height, width]`` and of the maps of
            the previous step, without gradient (None at the first step), that returns losses
            ``[samples]``.
        real: indices of all real tokens of the prompt, without padding and special tokens
            (``real_tokens`` finds them).
        normalise: ``real`` divides the maps by the attention of the image token to all real tokens,
            ``raw`` does not.
        layers: layers to read, as in ``Edit``. The additional forward pass ends at the last of
            them, so early layers make updates cheap.
        heads: heads to read, as in ``Edit``.
        attention: ``cross`` or ``self``. None means cross-attention if the model has it.
        scale: step size ``a`` at the first step; each model needs its own. 20 is that of
            Attend-and-Excite for Stable Diffusion. ``a`` is multiplied by the square root of a
            factor that falls linearly from 1 to ``final`` over the steps.
        final: the factor at the last step, from 0 to 1.
        start: the first step with an update, as in ``Edit``.
        stop: the step after the last one with an update, as in ``Edit``.
        refine: a mapping from steps (an int, or a float share of the steps) to losses. While the
            loss at such a step is above the given one, the latents are updated again, up to
            ``refinements`` times, before the update of the step. Samples below it stay.
        refinements: the largest number of these additional updates.
        recompute: whether blocks keep their inputs only and run again for the gradient, which saves
            memory.
        role: the denoiser of a pipeline with two, or ``any``.

    Raises:
        TypeError: ``loss`` is no function, or an index is no integer.
        ValueError: an argument is out of range, or ``normalise="real"`` lacks ``real``.

    Example:
        >>> from visattn.guidance import LatentUpdate, update_latents
        >>> def weakness(maps, previous):  # of the attention to the token
        ...     return 1 - maps.flatten(1).mean(1)
        >>> update = LatentUpdate(tokens=[1], loss=weakness, normalise="raw", stop=1)
        >>> with update_latents(pipe, update) as losses:
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=2)
        >>> list(losses)  # the steps with an update
        [0]
    """

    tokens: TextTokens = ()
    loss: Loss | None = None
    real: Sequence[int] | None = None
    normalise: Literal["raw", "real"] = "real"
    layers: Layers | HeadSet = None
    heads: Heads = None
    attention: Literal["self", "cross"] | None = None
    scale: float = 20.0
    final: float = 0.5
    start: int | float = 0
    stop: int | float = 0.5
    refine: Mapping[int | float, float] = field(default_factory=dict)
    refinements: int = 20
    recompute: bool = True
    role: str = "any"

    def __post_init__(self) -> None:
        name = type(self).__name__
        groups_of(f"{name}(tokens=...)", self.tokens)
        if not callable(self.loss):
            raise TypeError(
                f"{name}(loss={self.loss!r}) must be a function of maps; AStar and "
                "AttendAndExcite have the losses of their papers"
            )
        if self.normalise not in ("raw", "real"):
            raise ValueError(f"{name}(normalise={self.normalise!r}) must be raw or real")
        if self.normalise == "real" and not self.real:
            raise ValueError(
                f"{name}(normalise='real') needs the indices of the real tokens; give "
                "real=real_tokens(pipe.tokenizer, prompt), or normalise='raw'"
            )
        if self.attention not in (None, "self", "cross"):
            raise ValueError(f"{name}(attention={self.attention!r}) must be self, cross or None")
        if not 0 <= self.final <= 1 or not self.scale > 0:
            raise ValueError(
                f"{name}(scale={self.scale!r}, final={self.final!r}): scale must be above 0, and "
                "final from 0 to 1"
            )
        for step in self.refine:
            if not is_number(step) or step < 0:
                raise ValueError(
                    f"{name}(refine=...) has {step!r}; it must map steps, or shares of the steps, "
                    "to losses"
                )

    def active(self, step: int, steps: int) -> bool:
        """Return whether a step has an update.

        Args:
            step: index of the step.
            steps: number of steps.
        """
        return in_window(self.start, self.stop, step, steps)

    def size(self, step: int, steps: int) -> float:
        """Return the step size ``a`` at a step.

        Args:
            step: index of the step.
            steps: number of steps.
        """
        progress = step / max(1, steps - 1)
        return float(self.scale * (1 + (self.final - 1) * progress) ** 0.5)

    def bound(self, step: int, steps: int) -> float | None:
        """Return the loss above which a step updates again. None if it never does.

        Args:
            step: index of the step.
            steps: number of steps.
        """
        for when, loss in self.refine.items():
            if (when if isinstance(when, int) else round(when * steps)) == step:
                return loss
        return None

    def losses(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of each sample, ``[samples]``.

        Args:
            maps: the maps ``[samples, tokens, frames, height, width]``.
            before: the maps of the previous step, or None.

        Raises:
            ValueError: the loss has another shape.
        """
        assert self.loss is not None
        losses = self.loss(maps, before)
        if not isinstance(losses, torch.Tensor) or losses.shape != maps.shape[:1]:
            raise ValueError(
                f"loss returned the shape {list(getattr(losses, 'shape', ()))}; it must return a "
                f"number for each of the {maps.shape[0]} samples"
            )
        return losses


@dataclass(frozen=True, kw_only=True, eq=False)
class AStar(LatentUpdate):
    """Update the latents at every step so that the maps of subjects do not overlap, and stay where
    they were in the previous step (segregation and retention, A-STAR, Agarwal et al. 2023, arXiv
    2306.14544).

    Args:
        tokens: indices of the text tokens of at least two subjects, each an index or a group.
        layout: the wanted places of the subjects, 0 or 1, ``[samples or 1, tokens, frames, height,
            width]``. None means their places in the previous step: the maps scaled in each frame
            and cut at ``threshold``.
        threshold: the threshold of these maps, a choice of this project.

    The other arguments are those of ``LatentUpdate``; ``loss`` is fixed.

    Raises:
        TypeError: an index is no integer.
        ValueError: there are fewer than two subjects, or an argument is out of range.

    Example:
        >>> from visattn.guidance import AStar, real_tokens, update_latents
        >>> prompt = "a red square a blue circle"
        >>> update = AStar(tokens=[2, 5], real=real_tokens(pipe.tokenizer, prompt), layers=[0])
        >>> with update_latents(pipe, update) as losses:
        ...     video = pipe(prompt, height=16, width=16, num_frames=5, num_inference_steps=2)
        >>> list(losses)  # the steps with an update
        [0, 1]

    Source:
        Agarwal et al. (2023), "A-STAR", arXiv 2306.14544.
    Default:
        paper. No code of the authors is known.
    Differences:
        - The threshold of the map of the previous step, 0.5, is a choice of this project.
        - Maps are those of a transformer's layers; the paper has 16 x 16 maps of a UNet.
    """

    loss: Loss | None = field(default=None, init=False)
    stop: int | float = 1.0
    layout: torch.Tensor | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", self._loss)
        super().__post_init__()
        if len(self.tokens) < 2:
            raise ValueError("AStar(tokens=...) has one subject; it must have two or more")

    def _loss(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        loss = astar_segregation(maps)
        layout = self.layout
        if layout is None and before is not None:
            layout = token_masks(before, self.threshold)
        return loss if layout is None else loss + astar_retention(maps, layout)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttendAndExcite(LatentUpdate):
    """Update the latents so that the most neglected subject gets more attention
    (Attend-and-Excite, Chefer et al. 2023, arXiv 2301.13826).

    By default the first half of the steps has updates, and the steps 0, 10 and 20 of 50 refine
    until the attention reaches 0.05, 0.5 and 0.8.

    Maps are ``raw`` by default, as in the paper. Maps that are divided by the sum of the real
    tokens are of the order of 1, where the softmax at a sharpness of 100 saturates and has no
    gradient; use a sharpness of 10 with them.

    Args:
        real: indices of all real tokens of the prompt (``real_tokens`` finds them).
        subjects: indices of the tokens of the subjects, some of ``real``.
        sharpness: factor of the maps before the softmax over the real tokens.
        sigma: standard deviation of the blur in tokens, as in ``attend_and_excite``.

    The other arguments are those of ``LatentUpdate``; ``tokens`` and ``loss`` are fixed.

    Raises:
        TypeError: an index is no integer.
        ValueError: ``subjects`` are not among the real tokens, or an argument is out of range.

    Example:
        >>> from visattn.guidance import AttendAndExcite, real_tokens, update_latents
        >>> tokens = real_tokens(pipe.tokenizer, "a red square")
        >>> update = AttendAndExcite(real=tokens, subjects=[2], layers=[0], refinements=1)
        >>> with update_latents(pipe, update) as losses:
        ...     video = pipe("a red square", height=16, width=16, num_frames=5,
        ...                  num_inference_steps=2)
        >>> list(losses)  # the steps with an update
        [0]

    Source:
        Chefer et al. (2023), "Attend-and-Excite", arXiv 2301.13826. Code:
        github.com/yuval-alaluf/Attend-and-Excite (commit 163efdf).
    Default:
        code. ``sigma=0.5`` is the Gaussian of the paper.
    Differences:
        - Maps are those of a transformer's layers; the code has 16 x 16 maps of a UNet.
    """

    tokens: TextTokens = field(default=(), init=False)
    loss: Loss | None = field(default=None, init=False)
    normalise: Literal["raw", "real"] = "raw"
    subjects: Sequence[int] = ()
    sharpness: float = 100.0
    sigma: float = SIGMA
    refine: Mapping[int | float, float] = field(
        default_factory=lambda: {0: 0.95, 0.2: 0.5, 0.4: 0.2}
    )

    def __post_init__(self) -> None:
        real = as_indices("AttendAndExcite(real=...)", self.real or ())
        subjects = as_indices("AttendAndExcite(subjects=...)", self.subjects)
        if not subjects or not set(subjects) <= set(real):
            raise ValueError(
                f"AttendAndExcite(subjects={self.subjects!r}) must be some of the real tokens "
                f"{self.real!r}; give real=real_tokens(pipe.tokenizer, prompt)"
            )
        object.__setattr__(self, "tokens", real)
        object.__setattr__(self, "loss", self._loss)
        super().__post_init__()

    def _loss(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        indices = [list(self.tokens).index(subject) for subject in self.subjects]
        return attend_and_excite(maps, indices, sharpness=self.sharpness, sigma=self.sigma)
