"""One video from several prompts in sequence (DiTCtrl, Cai et al. 2024, arXiv 2412.18597)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from visattn._arguments import check_window, is_integer, is_number
from visattn.guidance.composition.windows import Windows
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.label_bias import RegionMask
from visattn.guidance.edits.share_keys import ShareKV
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import steer
from visattn.guidance.head_set import Layers
from visattn.guidance.token_maps.prompt_tokens import phrase_tokens
from visattn.guidance.token_maps.subject_masks import SubjectMasks
from visattn.inject.models.denoisers import attention_layers, known_denoisers

__all__ = ["WORD_SWAP", "ShareSettings", "generate_sequence"]

FRAME_AXES = {"Wan": 2, "CogVideoX": 1}
MINE = ("prompt", "prompt_embeds", "num_videos_per_prompt")


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """Where each segment attends to the keys and values of the one before it (``pairs`` of
    ``generate_sequence`` says to which).

    Args:
        layers: as for an ``Edit``; default: the last sixth, which are 25 to 29 of CogVideoX's 30.
        start, stop: the steps, as for an ``Edit``; by default 2 to 24 of 50.
        threshold: of the maps that masks are made from, which are scaled from 0 to 1 in each frame.
    """

    layers: Layers = None
    start: int | float = 0.04
    stop: int | float = 0.5
    threshold: float = 0.3

    def __post_init__(self) -> None:
        check_window("ShareSettings", self.start, self.stop)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"ShareSettings(threshold={self.threshold!r}) must be above 0 and at most 1"
            )


SHARE = ShareSettings()
WORD_SWAP = ShareSettings(start=0, stop=2)  # a word of the prompt changes, the layout stays


def generate_sequence(
    pipe: Any,
    prompts: Sequence[str],
    *,
    overlap: int | float = 6 / 13,
    transitions: int = 0,
    share: ShareSettings | None = SHARE,
    blend: bool = True,
    masks: Sequence[str] | None = None,
    pairs: bool = True,
    **call: Any,
) -> Any:
    """One continuous video from several prompts.

    There is a segment of the pipeline's length for each prompt, and for each transition between
    two. Segments are samples of one call of the pipeline, so that memory grows as their number
    does. They begin with windows of one noise; each attends to the keys and values of the one
    before; where they overlap they are blended in each step; the sequence is decoded once, by the
    pipeline.

    Args:
        pipe: a text-to-video pipeline of Wan or CogVideoX; with a plan, ``steer`` or ``guide`` or
            without.
        prompts: in their order; with one, this is the pipeline's own call.
        overlap: latent frames that neighbours have in common, fewer than a segment has; a float is
            a share of them. The paper has 6 of 13, and 9 with two transitions.
        transitions: segments between each two prompts, with embeddings that are interpolated.
        share: where keys and values are shared; None: nowhere. ``WORD_SWAP``: in the first two
            steps only.
        blend: whether overlaps are blended in each step; else each segment goes its own way, and
            they are blended at the end.
        masks: the subject's word in each prompt: then the subject of a segment attends to that of
            the one before, and the rest to the rest. Segments of a transition have both words.
        pairs: whether each two neighbours are denoised as a pair, so that a segment between two
            others is there twice: once with the keys and values of the one before it, which has its
            own there, and once with its own; both count in the blend. False: each segment is there
            once, with those of the one before as that attends itself, at about half the cost.
        call: arguments of the pipeline. ``num_frames`` is that of a segment, ``generator`` one,
            ``latents`` those of the whole sequence, and what ``callback_on_step_end`` is given are
            the segments' latents.

    Returns:
        What the pipeline gives: one video, of ``segments * length - (segments - 1) * overlap``
        latent frames. CogVideoX decodes an odd number of them to ``4 n - 3`` frames, as its own
        lengths are, and an even one to ``4 n``; of 1.5 the first latent frame is padding, which is
        dropped, where the pipeline adds it to a segment.

    Blending is that of ``x0``, or of any prediction of the denoiser: where the samples of a step
    are equal, ``x0`` is linear in the prediction, and the weights sum to 1. The blended predictions
    go to the scheduler with the sequence as one sample, and the segments are windows of what it
    makes. A scheduler of one step that is linear in sample and prediction (DDIM, Euler) would give
    the same when its samples are blended after the step. So would a multistep one (UniPC, DPM++):
    its history and its corrector are linear too, and weights are the same at all steps. What would
    not is noise that a scheduler draws in a step (CogVideoX's DPM): blended, its variance is too
    small, while the sequence gets one noise here.

    Raises:
        TypeError, ValueError: the pipeline or an argument is something else; a segment is not
            longer than the overlap; sharing is for steps that there are none of. The pipeline is
            then as it was.

    Source:
        Cai et al. (2024), "DiTCtrl", arXiv 2412.18597. Code: github.com/TencentARC/DiTCtrl (commit
        f1348b5).
    Default:
        code. Each two neighbours are a pair; ``pairs=False`` costs less.
    Differences:
        - Predictions are blended before the step of the scheduler; the code blends the clean
          latents, which is the same.
        - Layers are the last sixth, which are those of the code for CogVideoX-2B.
    """
    listed = _check(pipe, prompts, overlap, transitions, masks, call)
    if masks is not None and share is None:
        raise ValueError(f"masks={masks!r} are for sharing, and share is None; leave one out")
    if len(listed) == 1:
        return pipe(prompt=listed, **call)
    segments = _Segments(pipe, _frame_axis(pipe), len(listed), transitions, overlap, pairs)
    edits = [] if share is None else _sharing(pipe, share, segments, listed, masks)
    given = call.pop("callback_on_step_end", None)
    inputs = call.pop("callback_on_step_end_tensor_inputs", None) or []
    inputs = getattr(given, "tensor_inputs", inputs)
    with ExitStack() as stack:
        stack.enter_context(_replaced(pipe, "encode_prompt", segments.encoded))
        stack.enter_context(_replaced(pipe, "prepare_latents", segments.prepared))
        if blend:
            stack.enter_context(_replaced(pipe.scheduler, "step", segments.stepped))
        if edits:
            stack.enter_context(steer(pipe, edits))
        return pipe(
            prompt=listed,
            callback_on_step_end=segments.ended(given),
            callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *inputs])),
            **call,
        )


class _Segments:
    """The segments of a sequence, in what a call of a pipeline does with them.

    Attributes:
        of_sample: the segment of each sample.
        sources: for each sample whose keys and values are shared, that sample and its source.
        between: for each sample a prompt, the next one, and how far its segment is between them.
    """

    def __init__(
        self,
        pipe: Any,
        axis: int,
        prompts: int,
        transitions: int,
        overlap: int | float,
        pairs: bool,
    ) -> None:
        self.pipe, self.axis, self.prompts, self.overlap = pipe, axis, prompts, overlap
        each = transitions + 1
        count = (prompts - 1) * each + 1
        self.of_sample = tuple(range(count))
        self.sources = [(n, n - 1) for n in range(1, count)]
        if pairs:
            self.of_sample = tuple(n + own for n in range(count - 1) for own in range(2))
            self.sources = [(n, n - 1) for n in range(1, len(self.of_sample), 2)]
        self.between = [
            (number // each, min(number // each + 1, prompts - 1), number % each / each)
            for number in self.of_sample
        ]
        self.windows = Windows(self.of_sample, 1, 0, axis)  # until their length is known

    def encoded(self, encode: Any) -> Any:
        """``encode_prompt`` that gives embeddings of the segments for those of the prompts."""

        def of_segments(own: torch.Tensor | None) -> torch.Tensor | None:
            if own is None or len(own) == 1:
                return None if own is None else own.expand(len(self.between), *own.shape[1:])
            if len(own) != self.prompts:
                raise ValueError(
                    f"there are embeddings of {len(own)} texts for {self.prompts} prompts; give "
                    "one, or one for each prompt"
                )
            return torch.stack([torch.lerp(own[a], own[b], at) for a, b, at in self.between])

        def encoded(*args: Any, **kwargs: Any) -> Any:
            return tuple(map(of_segments, encode(*args, **kwargs)))

        return encoded

    def prepared(self, prepare: Any) -> Any:
        """``prepare_latents`` that gives windows of one long noise."""
        signature = inspect.signature(prepare)

        def prepared(*args: Any, **kwargs: Any) -> torch.Tensor:
            bound = signature.bind(*args, **kwargs)
            ratio = self.pipe.vae_scale_factor_temporal
            length = (bound.arguments["num_frames"] - 1) // ratio + 1
            own = self.overlap
            common = own if isinstance(own, int) else min(round(own * length), length - 1)
            if not 0 <= common < length:
                raise ValueError(
                    f"overlap={own!r} must be from 0 to {length - 1}, since a segment has {length} "
                    "latent frames, or a share of them below 1.0"
                )
            self.windows = Windows(self.of_sample, length, common, self.axis)
            total = self.windows.total
            bound.arguments.update(batch_size=1, num_frames=(total - 1) * ratio + 1)
            noise: torch.Tensor = prepare(*bound.args, **bound.kwargs)
            if len(noise) != 1 or noise.shape[self.axis] != total:
                raise ValueError(
                    f"latents has the shape {list(noise.shape)}; it must be those of the whole "
                    f"sequence, 1 sample with {total} frames in axis {self.axis}"
                )
            return self.windows.split(noise)

        return prepared

    def stepped(self, step: Any) -> Any:
        """A scheduler's ``step`` of the whole sequence."""

        def joined(value: Any) -> Any:
            return self.windows.join(value) if self._mine(value) else value

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            found = step(*map(joined, args), **{name: joined(x) for name, x in kwargs.items()})
            return tuple(map(self.windows.split, found))

        return stepped

    def _mine(self, value: Any) -> bool:
        """Whether something are latents of the segments."""
        return (
            isinstance(value, torch.Tensor)
            and value.ndim > self.axis
            and value.shape[0] == len(self.windows.segments)
            and value.shape[self.axis] == self.windows.length
        )

    def ended(self, given: Any) -> Any:
        """A callback at the end of a step, which makes one sequence of the segments at the last."""

        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found = dict(tensors if given is None else given(pipe, step, timestep, tensors))
            latents = found.get("latents", tensors["latents"])
            if step == pipe.num_timesteps - 1 or pipe.interrupt:
                latents = self.windows.join(latents)
            return {**found, "latents": latents}

        return ended


def _check(
    pipe: Any,
    prompts: Sequence[str],
    overlap: int | float,
    transitions: int,
    masks: Sequence[str] | None,
    call: Mapping[str, Any],
) -> list[str]:
    """The prompts, if all arguments are what they must be."""
    _frame_axis(pipe)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts={prompts!r} must be a list of texts, one for each part")
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts={prompts!r} must be texts, at least one")
    if not is_number(overlap) or overlap < 0:
        raise ValueError(f"overlap={overlap!r} must be latent frames, or a share below 1.0 of them")
    if isinstance(overlap, float) and overlap >= 1:
        raise ValueError(f"overlap={overlap!r} is a share of a segment; it is below 1.0")
    if not is_integer(transitions) or transitions < 0:
        raise ValueError(f"transitions={transitions!r} must be a number of segments from 0")
    if masks is not None and (isinstance(masks, str) or len(masks) != len(prompts)):
        raise ValueError(
            f"masks={masks!r} must have the subject's word of each of the {len(prompts)} prompts"
        )
    for name in MINE:
        if call.get(name) is not None:
            raise ValueError(f"{name}={call[name]!r} is not taken: a sequence is made from prompts")
    return list(prompts)


def _frame_axis(pipe: Any) -> int:
    """The axis of the frames in the latents of a pipeline."""
    (_, family), *_ = known_denoisers(pipe).values()
    own = getattr(pipe, "prepare_latents", None)
    axis = FRAME_AXES.get(family.name)
    if own is None or axis is None or "image" in inspect.signature(own).parameters:
        raise TypeError(
            f"pipe={type(pipe).__name__} must be a text-to-video pipeline of "
            f"{' or '.join(FRAME_AXES)}"
        )
    return axis


def _sharing(
    pipe: Any,
    share: ShareSettings,
    segments: _Segments,
    prompts: list[str],
    masks: Sequence[str] | None,
) -> list[Edit]:
    """The edits of a sequence."""
    (model, family), *_ = known_denoisers(pipe).values()
    paths = tuple(attention_layers(model, family))
    wanted = share.layers
    if wanted is None:
        wanted = range(len(paths) - max(1, round(len(paths) / 6)), len(paths))
    chosen = sorted(paths.index(path) for path in Edit(layers=wanted).place(paths, 1).strengths)
    window: dict[str, Any] = {"start": share.start, "stop": share.stop}
    # the last first: what a segment gives are keys and values of its own
    edits: list[Edit] = [
        ShareKV(source=source, samples=(sample,), layers=chosen, **window)
        for sample, source in reversed(segments.sources)
    ]
    if masks is None:
        return edits
    if chosen[0] == 0:
        raise ValueError(
            f"share has layer {paths[0]}, and masks are read in the layers before those that "
            "share; leave it out"
        )
    each = [
        phrase_tokens(pipe.tokenizer, prompt, word)
        for prompt, word in zip(prompts, masks, strict=True)
    ]
    tokens = [
        tuple(dict.fromkeys((*each[a], *(each[b] if at else ())))) for a, b, at in segments.between
    ]
    attention: Literal["self", "cross"] = "cross" if family.cross else "self"
    subjects = SubjectMasks(
        tokens,
        attention=attention,
        layers=range(chosen[0]),
        threshold=share.threshold,
        when="now",
    )
    mask = RegionMask(
        q_bits=functools.partial(_query_bits, subjects),
        k_bits=functools.partial(_key_bits, subjects),
        layers=chosen,
        samples=tuple(sample for sample, _ in segments.sources),
        **window,
    )
    return [*subjects.edits, *edits, mask]


SUBJECT, REST = 1, 2


def _query_bits(subjects: SubjectMasks, state: State) -> torch.Tensor:
    """Which keys the queries of each segment see: those of the subject, or the rest. Of the text
    the subject's tokens see the subject."""
    bits = torch.full((state.q.shape[0], state.q.shape[2]), REST)
    bits[:, state.image] = torch.where(subjects(state).cpu(), SUBJECT, REST)
    text = [place for first, end in state.texts for place in range(first, end)]
    for sample, tokens in enumerate(subjects.tokens if text else ()):
        bits[sample, [text[token] for token in tokens]] = SUBJECT
    return bits


def _key_bits(subjects: SubjectMasks, state: State) -> torch.Tensor:
    """What the keys of each sample are, which are those of the sample before where they are shared;
    text is both."""
    bits = torch.full((state.k.shape[0], state.k.shape[2]), SUBJECT | REST)
    own = torch.where(subjects(state).cpu(), SUBJECT, REST)
    bits[1:, state.image] = own[:-1]
    return bits


@contextmanager
def _replaced(own: Any, name: str, wrap: Any) -> Iterator[None]:
    """An object has another method inside."""
    before = vars(own).get(name)
    setattr(own, name, wrap(getattr(own, name)))
    try:
        yield
    finally:
        if before is None:
            vars(own).pop(name, None)
        else:
            setattr(own, name, before)
