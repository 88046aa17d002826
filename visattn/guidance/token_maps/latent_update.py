"""What latents are updated by: a loss of token maps, and how (A-STAR, Attend-and-Excite)."""

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
    """Before a step the latents go down the gradient of a loss of token maps: ``z <- z - a dL/dz``
    (``update_latents``).

    Args:
        tokens: numbers of text tokens, each a map; several in brackets are one, their sum.
        loss: gets the maps ``[samples, tokens, frames, height, width]`` and those of the step
            before, without gradient (None at the first); gives ``[samples]``.
        real: numbers of all real tokens, without padding and begin or end.
        normalise: ``real``: maps are divided by what an image token attends to all real tokens
            with; ``raw``: they are not.
        layers, heads: that are read, as for an ``Edit``; the forward ends at the last of them, so
            that early layers make updates cheap.
        attention: ``cross`` or ``self``; default: cross-attention where the model has it.
        scale: ``a`` at the first step, to be found for each model: 20 is that of Attend-and-Excite
            for Stable Diffusion. It is multiplied by ``sqrt`` of what falls from 1 to ``final``
            over the steps.
        start, stop: the steps, as for an ``Edit``.
        refine: by step (an int, or a share of the steps) the loss above which the latents are
            updated again, at most ``refinements`` times, before the update of the step. A sample
            below it stays meanwhile.
        recompute: blocks keep their inputs only and run again for the gradient.
        role: which denoiser of a pipeline that has two; ``any``.
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
                f"{name}(loss={self.loss!r}) must be a function of maps; take AStar or "
                "AttendAndExcite for those of the papers"
            )
        if self.normalise not in ("raw", "real"):
            raise ValueError(f"{name}(normalise={self.normalise!r}) must be raw or real")
        if self.normalise == "real" and not self.real:
            raise ValueError(
                f"{name}(normalise='real') needs the numbers of the real tokens in real=, which "
                "real_tokens(pipe.tokenizer, prompt) finds; normalise='raw' needs none"
            )
        if self.attention not in (None, "self", "cross"):
            raise ValueError(f"{name}(attention={self.attention!r}) must be self, cross or None")
        if not 0 <= self.final <= 1 or not self.scale > 0:
            raise ValueError(
                f"{name}(scale={self.scale!r}, final={self.final!r}) must be above 0, and 0 to 1"
            )
        for at in self.refine:
            if not is_number(at) or at < 0:
                raise ValueError(
                    f"{name}(refine=...) has {at!r}; it must be steps, or shares of the steps"
                )

    def active(self, step: int, steps: int) -> bool:
        """Whether a step is in the window."""
        return in_window(self.start, self.stop, step, steps)

    def size(self, step: int, steps: int) -> float:
        """``a`` at a step."""
        fallen = step / max(1, steps - 1)
        return float(self.scale * (1 + (self.final - 1) * fallen) ** 0.5)

    def bound(self, step: int, steps: int) -> float | None:
        """The loss above which a step refines; None where it does not."""
        for at, loss in self.refine.items():
            if (at if isinstance(at, int) else round(at * steps)) == step:
                return loss
        return None

    def losses(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The loss of each sample, ``[samples]``."""
        assert self.loss is not None
        found = self.loss(maps, before)
        if not isinstance(found, torch.Tensor) or found.shape != maps.shape[:1]:
            raise ValueError(
                f"the loss gave {list(getattr(found, 'shape', ()))}; it must give a number for "
                f"each of the {maps.shape[0]} samples"
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class AStar(LatentUpdate):
    """Segregation and retention (A-STAR, Agarwal et al. 2023, arXiv 2306.14544) at every step: the
    maps of ``tokens`` (two subjects or more) are not to overlap, and to stay where they were.

    Args:
        layout: where the subjects are to be, 0 or 1, ``[samples or 1, tokens, frames, height,
            width]``; default: where they were the step before, which is their map scaled in each
            frame and cut at ``threshold`` (a value of ours).

    Source:
        Agarwal et al. (2023), "A-STAR", arXiv 2306.14544.
    Default:
        paper. No code is known.
    Differences:
        - The threshold of the map of the step before, 0.5, is a choice of this project.
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
            raise ValueError("AStar(tokens=...) has one subject; it sets two or more apart")

    def _loss(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        loss = astar_segregation(maps)
        layout = self.layout
        if layout is None and before is not None:
            layout = token_masks(before, self.threshold)
        return loss if layout is None else loss + astar_retention(maps, layout)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttendAndExcite(LatentUpdate):
    """The most neglected subject is attended to more (Attend-and-Excite, Chefer et al. 2023, arXiv
    2301.13826), in the first half of the steps, with refinement to an attention of 0.05, 0.5 and
    0.8 at the steps 0, 10 and 20 of 50.

    Args:
        subjects: numbers of the subjects' tokens, among ``real``.
        sharpness: of the softmax over the real tokens, which leaves padding and begin or end out.
        sigma: of the blur, in tokens, as of ``attend_and_excite``.

    Maps are ``raw``, as in the paper: divided by the real tokens' sum they are of the order of 1,
    where the softmax at a sharpness of 100 is saturated and has no gradient; take 10 then.

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
                f"{self.real!r}, which real_tokens(pipe.tokenizer, prompt) finds"
            )
        object.__setattr__(self, "tokens", real)
        object.__setattr__(self, "loss", self._loss)
        super().__post_init__()

    def _loss(self, maps: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        at = [list(self.tokens).index(subject) for subject in self.subjects]
        return attend_and_excite(maps, at, sharpness=self.sharpness, sigma=self.sigma)
