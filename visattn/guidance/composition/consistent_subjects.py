"""Keep subjects consistent in all images or videos of a batch: the edits of ConsiStory,
StoryDiffusion and IR-Diffusion."""

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
    """Interpolate the queries of samples towards those of another sample: ``q + a (q_source - q)``,
    where ``a`` changes linearly over the steps of the edit.

    Args:
        first: ``a`` at the first step of the edit.
        last: ``a`` at the last step of the edit.
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
                "MixQueries needs the step of the call, which is not known; steer the pipeline "
                "that runs"
            )
        begin, end = (
            bound if isinstance(bound, int) else math.ceil(bound * steps)
            for bound in (self.start, self.stop)
        )
        progress = (step - begin) / max(1, min(end, steps) - 1 - begin)
        super().apply(state, strength * (self.first + (self.last - self.first) * progress))


@dataclass(frozen=True, kw_only=True, eq=False)
class BorrowSometimes(BorrowKeys):
    """``BorrowKeys`` in a random part of the attention calls, drawn by ``seed`` for each layer and
    step.

    Args:
        probability: probability that a call borrows keys.
    """

    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"BorrowSometimes(probability={self.probability!r}) must be above 0 and at most 1"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        call_seed = (self.seed * 1_000_003 + (state.call.step or 0)) * 1009 + state.call.number
        random = torch.Generator().manual_seed(call_seed)
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
    """Return the edits of ConsiStory: the samples of a batch attend to the subject of other samples
    in addition to their own tokens, by masks from the previous step (Tewel et al. 2024, arXiv
    2402.03286).

    Args:
        tokens: text tokens of the subject in each prompt (``phrase_tokens`` finds them), a group
            for each sample.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence.
        anchors: number of anchors. The first samples are anchors, which attend to each other; the
            others attend to the anchors. None means that every sample attends to all others.
        dropout: share of the tokens of a mask that is left out, drawn again in each step.
        threshold: threshold of the maps, or ``otsu`` as in the paper.
        twins: whether the batch has each sample twice, the second time without the edits. The
            queries of the first half are then mixed with those of the second half in the first
            tenth of the steps, with a share that falls from 0.9 to 0.818. Give prompts and latents
            twice, and keep the first half of the results.
        layers: layers that share keys, as in ``Edit``. The paper uses the up blocks of a UNet,
            which have no counterpart in a transformer.
        start: the first step, as in ``Edit``. The default is the second of 50 steps.
        stop: the step after the last one, as in ``Edit``.
        seed: seed of the dropout.

    Returns:
        The edits, for ``steer``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import consistory, phrase_tokens, steer
        >>> prompts = ["a red square", "a red square moves"]
        >>> words = [phrase_tokens(pipe.tokenizer, prompt, "square") for prompt in prompts]
        >>> with steer(pipe, consistory(words, attention="cross", start=1)):
        ...     videos = pipe(prompts, height=16, width=16, num_frames=5, num_inference_steps=2)

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
        raise ValueError(f"anchors={anchors!r} must be from 1 to {count}, or None for all")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be from 0 to below 1")
    groups = [*tokens, *([()] * count if twins else [])]
    subjects = SubjectMasks(groups, attention=attention, threshold=threshold)
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
    """Return the edits of StoryDiffusion: the samples of a batch attend to a random share of the
    tokens of other samples in addition to their own (Zhou et al. 2024, arXiv 2405.01434).

    The first tenth of the steps is not edited. An attention call then borrows tokens with a
    probability of 0.7, and from 0.4 of the steps on with a probability of 0.9.

    Args:
        samples: number of samples of a pass.
        sources: number of samples whose tokens are drawn. These are the first ones.
        share: share of their tokens that is drawn.
        layers: layers with the edits, as in ``Edit``. The paper uses the up blocks of a UNet.
        seed: seed of all draws, which are repeated in each step.

    Returns:
        The edits, for ``steer``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import steer, story_diffusion
        >>> with steer(pipe, story_diffusion(samples=2, sources=1)):
        ...     videos = pipe(["a red square", "a blue square"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=10)

    Source:
        Zhou et al. (2024), "StoryDiffusion", arXiv 2405.01434.
    Default:
        paper.
    Differences:
        - All layers share keys; the code has the up blocks of a UNet.
        - Each layer has a draw of its own in each step; the code draws once for all layers and both
          sizes.
    """
    if samples < 2 or sources < 1:
        raise ValueError(
            f"samples={samples!r} must be at least 2, and sources={sources!r} at least 1"
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
    """Return the edits of IR-Diffusion: samples attend to each subject in a reference sample of it
    in addition to their own tokens, and the subjects do not see each other (DreamStory, He et al.
    2024, arXiv 2407.12899). The first samples of the batch are the references, one for each
    subject.

    Args:
        references: mask of the subject in each reference, bool ``[subjects, image tokens]`` or
            ``[subjects, frames, height, width]``.
        regions: mask of each subject in the targets, of the same shape. Tokens in several regions
            see all their subjects, tokens in none see everything.
        targets: indices of the samples that get the subjects.
        dropout: share of the tokens of a reference that is left out, drawn again in each step.
        layers: layers that see the references, as in ``Edit``. The paper uses those of the decoder,
            the second half. Subjects are isolated in all layers, as in the paper.
        seed: seed of the dropout.
        reposition: the pipeline or its denoiser. Borrowed keys then get the rotary positions that
            map the bounding box of a subject in its reference to that of its region. With None they
            keep the positions of their reference, so a reference should show its subject where the
            targets shall have it.

    Returns:
        The edits, for ``steer``.

    Raises:
        ValueError: an argument is out of range; or, with ``reposition``, a mask is empty, or the
            denoiser has no rotary position embedding of Wan or Flux.

    Example:
        >>> import torch
        >>> from visattn.guidance import ir_diffusion, steer
        >>> subject = torch.tensor([[True, False]])  # of the two tokens of this tiny video
        >>> with steer(pipe, ir_diffusion(subject, ~subject, targets=(1,), reposition=pipe)):
        ...     videos = pipe(["a red square", "a red square moves"], height=16, width=16,
        ...                   num_frames=5, num_inference_steps=1)

    Source:
        He et al. (2024), "DreamStory", arXiv 2407.12899.
    Default:
        paper.
    Differences:
        - ``reposition`` moves the positions of keys; the paper resizes features before keys and
          values are projected.
        - Mutual cross-attention, which equals regional prompts, is left out.
    """
    in_references, in_targets = (mask.flatten(1) != 0 for mask in (references, regions))
    count = len(in_references)
    if in_references.shape != in_targets.shape or not count:
        raise ValueError(
            f"references has the shape {list(references.shape)} and regions {list(regions.shape)}; "
            "they must be [subjects, image tokens] with one reference for each subject"
        )
    if not targets or min(targets) < count:
        raise ValueError(
            f"targets={targets!r} must be indices of samples after the {count} references, at "
            "least one"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be from 0 to below 1")
    if reposition is not None and not (in_references.any(1) & in_targets.any(1)).all():
        raise ValueError(
            "references or regions has an empty mask, and reposition needs both masks of each "
            "subject; give each mask a token, or reposition=None"
        )
    rotary = None if reposition is None else rotary_of(reposition)
    everything = 2**count - 1
    subject_index = torch.arange(count, device=in_targets.device)[:, None]
    bits = (in_targets.to(torch.int64) << subject_index).sum(0)
    bits = torch.where(bits == 0, everything, bits)

    def tokens(state: State) -> torch.Tensor:
        _check_size(state, in_references.shape[1])
        masks = torch.zeros(state.q.shape[0], in_references.shape[1], dtype=torch.bool)
        masks[:count] = in_references
        return masks

    def labels(state: State) -> torch.Tensor:
        _check_size(state, len(bits))
        out = torch.full((state.q.shape[2],), everything)
        out[state.image] = bits.cpu()
        return out

    @functools.cache
    @lasting
    def shifts(shape: tuple[int, int, int]) -> list[list[torch.Tensor]]:
        pairs = zip(in_references.cpu(), in_targets.cpu(), strict=True)
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


def _shifts(reference: torch.Tensor, region: torch.Tensor) -> list[torch.Tensor]:
    """Return the shifts that map the bounding box of one mask to that of another one.

    Args:
        reference: mask of a subject in its reference, bool ``[frames, height, width]``.
        region: mask of its region, of the same shape.

    Returns:
        Shifts of the frames, rows and columns, in tokens.
    """
    out = []
    for axis, length in enumerate(reference.shape):
        (old_start, old_size), (start, size) = (_extent(mask, axis) for mask in (reference, region))
        positions = torch.arange(length, dtype=torch.float64)
        # the centre of token i is at i + 0.5
        moved = start + (positions - old_start + 0.5) * (size / old_size) - 0.5
        out.append(moved - positions)
    return out


def _extent(mask: torch.Tensor, axis: int) -> tuple[int, int]:
    """Return the first index of a mask along an axis, and its extent."""
    indices = mask.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
    return int(indices[0]), int(indices[-1] - indices[0]) + 1


def _check_size(state: State, tokens: int) -> None:
    """Raise ValueError unless a call has a number of image tokens."""
    image = state.image.stop - state.image.start
    if image != tokens:
        raise ValueError(
            f"references and regions have {tokens} tokens, and {state.call.layer} has {image} "
            "image tokens; give the masks at that size"
        )
