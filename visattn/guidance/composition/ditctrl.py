"""One video from several prompts in sequence (DiTCtrl, Cai et al. 2024, arXiv 2412.18597)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from visattn._arguments import is_integer, is_number
from visattn.guidance.composition.shared_segments import SHARE, ShareSettings, sharing_edits
from visattn.guidance.composition.windows import Windows
from visattn.guidance.edits.steer import steer
from visattn.inject.models.denoisers import known_denoisers

__all__ = ["generate_sequence"]

FRAME_AXES = {"Wan": 2, "CogVideoX": 1}
# arguments of the pipeline that generate_sequence sets
FIXED = ("prompt", "prompt_embeds", "num_videos_per_prompt")


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
    """Generate one continuous video from several prompts.

    The video has a segment of the pipeline's length for each prompt, and for each transition
    between two prompts. All segments are samples of one call of the pipeline, so memory grows with
    their number. They start as windows of one long noise, each attends to the keys and values of
    the previous segment, and their overlaps are blended in each step. The pipeline decodes the
    sequence once.

    The blend averages the predictions of the denoiser before the scheduler's step, and the
    scheduler gets the sequence as one sample. This equals a blend of ``x0``: the segments have
    equal samples where they overlap, ``x0`` is linear in the prediction, and the weights sum to 1.
    It also equals a blend of the samples after the step for schedulers that are linear in sample
    and prediction, with one step (DDIM, Euler) or several (UniPC, DPM++). Only schedulers that draw
    noise in a step (DPM of CogVideoX) differ: blended noise would have too small a variance, and
    here the sequence gets one noise.

    Args:
        pipe: a text-to-video pipeline of Wan or CogVideoX, with a plan, ``steer`` or ``guide`` or
            without.
        prompts: the prompts, in their order. With one prompt, this is a plain call of the pipeline.
        overlap: number of latent frames that neighbours share, less than a segment has, or a float
            share of a segment. The paper uses 6 of 13, and 9 of 13 with two transitions.
        transitions: number of segments between two prompts, with interpolated text embeddings.
        share: the layers and steps that share keys and values. None means no sharing. ``WORD_SWAP``
            shares in the first two steps only.
        blend: whether overlaps are blended in each step. Otherwise they are blended after the last
            step only.
        masks: the word of the subject in each prompt. The subject of a segment then attends to that
            of the previous segment, and the background to the background. Segments of a transition
            have both words.
        pairs: whether every two neighbours are denoised as a pair. A segment between two others
            then has two samples, one with shared keys and values and one with its own, which both
            count in the blend. False means one sample for each segment, which costs about half.
        call: arguments of the pipeline. ``num_frames`` is the length of a segment, ``generator`` is
            a single one, ``latents`` are those of the whole sequence, and
            ``callback_on_step_end`` gets the latents of the segments.

    Returns:
        The output of the pipeline with one video, which has ``segments * length - (segments - 1) *
        overlap`` latent frames. CogVideoX decodes an odd number ``n`` of latent frames to ``4 n -
        3`` frames and an even number to ``4 n``. CogVideoX 1.5 adds a padding frame in front, which
        is dropped.

    Raises:
        TypeError: the pipeline or an argument has the wrong type.
        ValueError: an argument is out of range, a segment is not longer than the overlap, or
            ``share`` covers no step. After an error the pipeline computes what it did before.

    Example:
        >>> from visattn.guidance import WORD_SWAP, generate_sequence
        >>> frames = generate_sequence(
        ...     pipe, ["a red square", "a blue square"], overlap=1, share=WORD_SWAP, height=16,
        ...     width=16, num_frames=9, num_inference_steps=2,
        ... ).frames
        >>> frames.shape  # 5 latent frames of two segments with 3, decoded to 17 frames
        (1, 17, 16, 16, 3)

    Source:
        Cai et al. (2024), "DiTCtrl", arXiv 2412.18597. Code: github.com/TencentARC/DiTCtrl (commit
        f1348b5).
    Default:
        code. Every two neighbours are a pair; ``pairs=False`` costs less.
    Differences:
        - Predictions are blended before the step of the scheduler; the code blends the clean
          latents, which is equivalent.
        - The last sixth of the layers shares, which equals the layers of the code for CogVideoX-2B.
    """
    listed = _check(pipe, prompts, overlap, transitions, masks, call)
    if masks is not None and share is None:
        raise ValueError(f"masks={masks!r} need sharing, and share is None; leave one of them out")
    if len(listed) == 1:
        return pipe(prompt=listed, **call)
    segments = _Segments(pipe, _frame_axis(pipe), len(listed), transitions, overlap, pairs)
    edits = [] if share is None else sharing_edits(
        pipe, share, segments.sources, segments.between, listed, masks
    )
    callback = call.pop("callback_on_step_end", None)
    inputs = call.pop("callback_on_step_end_tensor_inputs", None) or []
    inputs = getattr(callback, "tensor_inputs", inputs)
    with ExitStack() as stack:
        stack.enter_context(_replaced(pipe, "encode_prompt", segments.encoded))
        stack.enter_context(_replaced(pipe, "prepare_latents", segments.prepared))
        if blend:
            stack.enter_context(_replaced(pipe.scheduler, "step", segments.stepped))
        if edits:
            stack.enter_context(steer(pipe, edits))
        return pipe(
            prompt=listed,
            callback_on_step_end=segments.ended(callback),
            callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *inputs])),
            **call,
        )


class _Segments:
    """The segments of a sequence, and the replaced methods of a pipeline that handle them.

    Args:
        pipe: the pipeline.
        axis: axis of the frames in latents.
        prompts: number of prompts.
        transitions: number of segments between two prompts.
        overlap: overlap in latent frames, or as a share.
        pairs: whether every two neighbours are a pair.

    Attributes:
        of_sample: the segment of each sample.
        sources: pairs of a sample that uses shared keys and values and the sample they come from.
        between: for each sample the index of a prompt, that of the next prompt, and the position of
            its segment between them from 0 to 1.
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
        spacing = transitions + 1
        count = (prompts - 1) * spacing + 1
        self.of_sample = tuple(range(count))
        self.sources = [(n, n - 1) for n in range(1, count)]
        if pairs:
            self.of_sample = tuple(n + second for n in range(count - 1) for second in range(2))
            self.sources = [(n, n - 1) for n in range(1, len(self.of_sample), 2)]
        self.between = [
            (
                segment // spacing,
                min(segment // spacing + 1, prompts - 1),
                segment % spacing / spacing,
            )
            for segment in self.of_sample
        ]
        self.windows = Windows(self.of_sample, 1, 0, axis)  # replaced when the length is known

    def encoded(self, encode: Any) -> Any:
        """Return an ``encode_prompt`` that returns embeddings of the segments."""

        def of_segments(texts: torch.Tensor | None) -> torch.Tensor | None:
            if texts is None or len(texts) == 1:
                return None if texts is None else texts.expand(len(self.between), *texts.shape[1:])
            if len(texts) != self.prompts:
                raise ValueError(
                    f"there are embeddings of {len(texts)} texts for {self.prompts} prompts; give "
                    "one, or one for each prompt"
                )
            return torch.stack(
                [torch.lerp(texts[a], texts[b], position) for a, b, position in self.between]
            )

        def encoded(*args: Any, **kwargs: Any) -> Any:
            return tuple(map(of_segments, encode(*args, **kwargs)))

        return encoded

    def prepared(self, prepare: Any) -> Any:
        """Return a ``prepare_latents`` that returns windows of one long noise."""
        signature = inspect.signature(prepare)

        def prepared(*args: Any, **kwargs: Any) -> torch.Tensor:
            bound = signature.bind(*args, **kwargs)
            ratio = self.pipe.vae_scale_factor_temporal
            length = (bound.arguments["num_frames"] - 1) // ratio + 1
            overlap = self.overlap
            if not isinstance(overlap, int):
                overlap = min(round(overlap * length), length - 1)
            if not 0 <= overlap < length:
                raise ValueError(
                    f"overlap={self.overlap!r} must be from 0 to {length - 1}, since a segment has "
                    f"{length} latent frames, or a share of them below 1.0"
                )
            self.windows = Windows(self.of_sample, length, overlap, self.axis)
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
        """Return a ``step`` of a scheduler that runs on the whole sequence."""

        def joined(value: Any) -> Any:
            return self.windows.join(value) if self._has_segments(value) else value

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            out = step(*map(joined, args), **{name: joined(x) for name, x in kwargs.items()})
            return tuple(map(self.windows.split, out))

        return stepped

    def _has_segments(self, value: Any) -> bool:
        """Return whether a value is a tensor of latents of the segments."""
        return (
            isinstance(value, torch.Tensor)
            and value.ndim > self.axis
            and value.shape[0] == len(self.windows.segments)
            and value.shape[self.axis] == self.windows.length
        )

    def ended(self, callback: Any) -> Any:
        """Return a callback for the end of a step, which blends the segments after the last step.

        Args:
            callback: the callback of the caller, which runs first, or None.
        """

        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            out = dict(tensors if callback is None else callback(pipe, step, timestep, tensors))
            latents = out.get("latents", tensors["latents"])
            if step == pipe.num_timesteps - 1 or pipe.interrupt:
                latents = self.windows.join(latents)
            return {**out, "latents": latents}

        return ended


def _check(
    pipe: Any,
    prompts: Sequence[str],
    overlap: int | float,
    transitions: int,
    masks: Sequence[str] | None,
    call: Mapping[str, Any],
) -> list[str]:
    """Check the arguments of ``generate_sequence``, and return the prompts as a list."""
    _frame_axis(pipe)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts={prompts!r} must be a list of texts, one for each part")
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts={prompts!r} must be texts, at least one")
    if not is_number(overlap) or overlap < 0:
        raise ValueError(f"overlap={overlap!r} must be latent frames, or a share below 1.0 of them")
    if isinstance(overlap, float) and overlap >= 1:
        raise ValueError(f"overlap={overlap!r} is a share of a segment; it must be below 1.0")
    if not is_integer(transitions) or transitions < 0:
        raise ValueError(f"transitions={transitions!r} must be a number of segments, from 0 on")
    if masks is not None and (isinstance(masks, str) or len(masks) != len(prompts)):
        raise ValueError(
            f"masks={masks!r} must have the subject's word of each of the {len(prompts)} prompts"
        )
    for name in FIXED:
        if call.get(name) is not None:
            raise ValueError(f"{name}={call[name]!r} is not allowed; give the texts in prompts")
    return list(prompts)


def _frame_axis(pipe: Any) -> int:
    """Return the axis of the frames in the latents of a pipeline."""
    (_, family), *_ = known_denoisers(pipe).values()
    prepare = getattr(pipe, "prepare_latents", None)
    axis = FRAME_AXES.get(family.name)
    if prepare is None or axis is None or "image" in inspect.signature(prepare).parameters:
        raise TypeError(
            f"pipe={type(pipe).__name__} must be a text-to-video pipeline of "
            f"{' or '.join(FRAME_AXES)}"
        )
    return axis


@contextmanager
def _replaced(target: Any, name: str, wrap: Any) -> Iterator[None]:
    """Replace a method of an object inside the ``with`` block.

    Args:
        target: the object.
        name: name of the method.
        wrap: a function of the method that returns the replacement.
    """
    before = vars(target).get(name)
    setattr(target, name, wrap(getattr(target, name)))
    try:
        yield
    finally:
        if before is None:
            vars(target).pop(name, None)
        else:
            setattr(target, name, before)
