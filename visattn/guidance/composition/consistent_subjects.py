"""The same subjects in all images or videos of a batch: the edits of ConsiStory, StoryDiffusion and
IR-Diffusion."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.label_bias import RegionMask
from visattn.guidance.edits.query_edits import ReplaceQueries
from visattn.guidance.edits.share_keys import BorrowKeys, rotary_of
from visattn.guidance.edits.state import State
from visattn.guidance.head_set import HeadSet, Layers
from visattn.guidance.token_maps.subject_masks import SubjectMasks
from visattn.guidance.token_maps.token_readout import Threshold
from visattn.runtime.torch_settings import lasting

__all__ = ["BorrowSometimes", "MixQueries", "consistory", "ir_diffusion", "story_diffusion"]


@dataclass(frozen=True, kw_only=True)
class MixQueries(ReplaceQueries):
    """Queries of samples are moved towards those of another sample, by less and less: ``q + a
    (q_source - q)``.

    Args:
        first, last: ``a`` at the first and the last step of the window, in a line between.
    """

    first: float = 0.9
    last: float = 0.818

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.first <= 1 and 0 <= self.last <= 1):
            raise ValueError(
                f"MixQueries(first={self.first!r}, last={self.last!r}) must be from 0 to 1"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        step, steps = state.call.step, state.call.steps
        if step is None or steps is None:
            raise ValueError(
                "MixQueries goes by steps, and the step of this call is not known; steer the "
                "pipeline that runs"
            )
        begin, end = (
            bound if isinstance(bound, int) else math.ceil(bound * steps)
            for bound in (self.start, self.stop)
        )
        done = (step - begin) / max(1, min(end, steps) - 1 - begin)
        super().apply(state, strength * (self.first + (self.last - self.first) * done))


@dataclass(frozen=True, kw_only=True, eq=False)
class BorrowSometimes(BorrowKeys):
    """``BorrowKeys`` in some of the calls, which are drawn for each layer and step by the seed.

    Args:
        probability: of a call.
    """

    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"BorrowSometimes(probability={self.probability!r}) must be above 0 and at most 1"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        at = (self.seed * 1_000_003 + (state.call.step or 0)) * 1009 + state.call.number
        random = torch.Generator().manual_seed(at)
        if float(torch.rand((), generator=random)) < self.probability:
            super().apply(state, strength)


def consistory(
    tokens: Sequence[Sequence[int]],
    *,
    attention: Literal["self", "cross"],
    anchors: int | None = 2,
    dropout: float = 0.5,
    threshold: Threshold = "otsu",
    twins: bool = False,
    layers: Layers | HeadSet = None,
    start: int | float = 0.02,
    stop: int | float = 1.0,
    seed: int = 0,
) -> list[Edit]:
    """The edits of ConsiStory (Tewel et al. 2024, arXiv 2402.03286) for ``steer``: images of a
    batch attend to the subject of the others beside their own tokens, by masks from the step
    before.

    Args:
        tokens: of the subject in each prompt (``phrase_tokens``), a group for each sample.
        attention: where text is: ``cross``, or ``self`` where it is part of the sequence.
        anchors: the first samples, which attend to each other, and which the others attend to;
            None: all of them to all others.
        dropout: the share of a mask's tokens that is left out in each step.
        threshold: of the maps; ``otsu`` as the paper.
        twins: the batch has each sample twice, the second time as it would be without: the first
            half's queries are mixed with those of the second in the first tenth of the steps (0.9
            to 0.818 of them). Give prompts and latents twice, and keep the first half.
        layers: that keys are shared in; default: all. The paper's are the up blocks of a UNet,
            which a transformer has no like of.
        start, stop: the steps; by default from the second on, at 50 steps.
        seed: of the dropout.

    Source:
        Tewel et al. (2024), "Training-Free Consistent Text-to-Image Generation", arXiv 2402.03286.
    Default:
        paper.
    Differences:
        - All layers share keys; the paper has the up blocks of a UNet.
        - Injection of features by correspondence and FreeU, which are for UNets, are left out.
    """
    count = len(tokens)
    if anchors is not None and not 1 <= anchors <= count:
        raise ValueError(f"anchors={anchors!r} must be from 1 to the {count} samples; None is all")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be from 0 to below 1")
    every = [*tokens, *([()] * count if twins else [])]
    subjects = SubjectMasks(every, attention=attention, threshold=threshold)
    borrow = BorrowKeys(
        sources=tuple(range(count if anchors is None else anchors)),
        samples=tuple(range(count)),
        tokens=subjects,
        share=1 - dropout,
        seed=seed,
        layers=layers,
        start=start,
        stop=stop,
    )
    mixed = [
        MixQueries(source=count + n, samples=(n,), layers=layers, stop=0.1) for n in range(count)
    ]
    return [*subjects.edits, *(mixed if twins else []), borrow]


def story_diffusion(
    samples: int,
    *,
    sources: int = 4,
    share: float = 0.5,
    layers: Layers | HeadSet = None,
    seed: int = 0,
) -> list[Edit]:
    """The edits of StoryDiffusion (Zhou et al. 2024, arXiv 2405.01434) for ``steer``: images of a
    batch attend to a random share of the others' tokens beside their own. The first tenth of the
    steps is plain, then a call has it with a probability of 0.7, and from 0.4 of the steps on of
    0.9.

    Args:
        samples: of a pass.
        sources: the first samples, whose tokens are drawn.
        share: of their tokens.
        layers: default: all. The paper's are the up blocks of a UNet.
        seed: of all that is drawn, anew in each step.

    Source:
        Zhou et al. (2024), "StoryDiffusion", arXiv 2405.01434.
    Default:
        paper.
    Differences:
        - All layers share keys; the code has the up blocks of a UNet.
        - Each layer is drawn for in each step; the code draws once for all layers and both sizes.
    """
    if samples < 2 or sources < 1:
        raise ValueError(
            f"samples={samples!r}, sources={sources!r} must be at least 2 and at least 1"
        )
    return [
        BorrowSometimes(
            sources=tuple(range(min(sources, samples))),
            samples=tuple(range(samples)),
            share=share,
            seed=seed,
            layers=layers,
            start=start,
            stop=stop,
            probability=probability,
        )
        for start, stop, probability in ((0.1, 0.4, 0.7), (0.4, 1.0, 0.9))
    ]


def ir_diffusion(
    references: torch.Tensor,
    regions: torch.Tensor,
    targets: tuple[int, ...],
    *,
    dropout: float = 0.5,
    layers: Layers | HeadSet = None,
    seed: int = 0,
    reposition: Any = None,
) -> list[Edit]:
    """The edits of IR-Diffusion (DreamStory, He et al. 2024, arXiv 2407.12899) for ``steer``:
    images attend to each subject in a reference image of it beside their own tokens, and subjects
    do not see each other. The references are the first samples of the batch, one for each subject.

    Args:
        references: where the subject is in each reference, bool ``[subjects, image tokens]`` or
            ``[subjects, frames, height, width]``.
        regions: where each subject is in the targets, of the same shape; tokens of several subjects
            see them all, and those of none see everything.
        targets: numbers of the samples that are to have the subjects.
        dropout: the share of a reference's tokens that is left out in each step.
        layers: that references are seen in; default: all. The paper's are the decoder's, the latter
            half; isolation is in all layers, as there.
        seed: of the dropout.
        reposition: the pipeline, or its denoiser: borrowed keys get the rotary positions that they
            have when the box around a subject in its reference is laid on that around its region.
            None: they have those of their reference, so a subject is best shown where it is to be.

    Raises:
        ValueError: an argument is something else; with ``reposition``, a mask without a token, or a
            denoiser whose rotary positions are not known (those of Wan and Flux are).

    Source:
        He et al. (2024), "DreamStory", arXiv 2407.12899.
    Default:
        paper.
    Differences:
        - ``reposition`` moves the positions of keys; the paper resizes features before keys and
          values are projected.
        - Mutual cross-attention, which is that of regional prompts, is left out.
    """
    seen, own = (mask.flatten(1) != 0 for mask in (references, regions))
    count = len(seen)
    if seen.shape != own.shape or not count:
        raise ValueError(
            f"references has the shape {list(references.shape)} and regions {list(regions.shape)}; "
            "they must be [subjects, image tokens] with one reference for each subject"
        )
    if not targets or min(targets) < count:
        raise ValueError(
            f"targets={targets!r} must be samples after the {count} references, at least one"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be from 0 to below 1")
    if reposition is not None and not (seen.any(1) & own.any(1)).all():
        raise ValueError(
            "references or regions has a subject without a token, and reposition moves subjects "
            "from the one to the other; give each a token, or reposition=None"
        )
    rotary = None if reposition is None else rotary_of(reposition)
    everything = 2**count - 1
    bits = (own.to(torch.int64) << torch.arange(count, device=own.device)[:, None]).sum(0)
    bits = torch.where(bits == 0, everything, bits)

    def tokens(state: State) -> torch.Tensor:
        _check_size(state, seen.shape[1])
        masks = torch.zeros(state.q.shape[0], seen.shape[1], dtype=torch.bool)
        masks[:count] = seen
        return masks

    def labels(state: State) -> torch.Tensor:
        _check_size(state, len(bits))
        out = torch.full((state.q.shape[2],), everything)
        out[state.image] = bits.cpu()
        return out

    @functools.cache
    @lasting
    def shifts(shape: tuple[int, int, int]) -> list[list[torch.Tensor]]:
        pairs = zip(seen.cpu(), own.cpu(), strict=True)
        return [_shifts(*(mask.reshape(shape) for mask in pair)) for pair in pairs]

    def moved(state: State) -> torch.Tensor:
        assert rotary is not None
        keys, image = state.k.clone(), state.image
        for subject, each in enumerate(shifts(state.call.layout.grids[0][1].shape)):
            keys[subject, :, image] = rotary.moved(keys[subject, :, image], each)
        return keys

    borrow = BorrowKeys(
        sources=tuple(range(count)),
        samples=targets,
        tokens=tokens,
        share=1 - dropout,
        seed=seed,
        keys=None if rotary is None else moved,
        layers=layers,
    )
    return [borrow, RegionMask(q_bits=labels, samples=targets)]


def _shifts(seen: torch.Tensor, own: torch.Tensor) -> list[torch.Tensor]:
    """By how much frames ``[T]``, rows ``[H]`` and columns ``[W]`` move, in tokens, when the box
    around a mask ``[T, H, W]`` is laid on that around another."""
    out = []
    for axis, length in enumerate(seen.shape):
        (first, size), (to, wide) = (_extent(mask, axis) for mask in (seen, own))
        at = torch.arange(length, dtype=torch.float64)
        # a token is as wide as the way to the next
        out.append(to + (at - first + 0.5) * (wide / size) - 0.5 - at)
    return out


def _extent(mask: torch.Tensor, axis: int) -> tuple[int, int]:
    """Where a mask begins on an axis, and how far it goes."""
    at = mask.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
    return int(at[0]), int(at[-1] - at[0]) + 1


def _check_size(state: State, tokens: int) -> None:
    image = state.image.stop - state.image.start
    if image != tokens:
        raise ValueError(
            f"references and regions have {tokens} tokens, and {state.call.layer} has {image} of "
            "the image; give them at that size"
        )
