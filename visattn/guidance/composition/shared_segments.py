"""The keys and values that the segments of a video share: settings and edits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from visattn._arguments import POSITIVE_SHARE, check_number, check_window
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.label_bias import RegionMask
from visattn.guidance.edits.share_keys import ShareKV
from visattn.guidance.edits.state import State
from visattn.guidance.head_set import Layers
from visattn.guidance.token_maps.prompt_tokens import phrase_tokens
from visattn.guidance.token_maps.subject_masks import SubjectMasks
from visattn.inject.models.denoisers import attention_layers, known_denoisers

__all__ = ["SHARE", "WORD_SWAP", "ShareSettings", "sharing_edits"]


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """The layers and steps in which each segment of ``generate_sequence`` attends to the keys and
    values of the previous segment.

    Args:
        layers: layers that share, as in ``Edit``. None means the last sixth, which is 25 to 29 of
            the 30 layers of CogVideoX.
        start: the first step, as in ``Edit``. The default is step 2 of 50.
        stop: the step after the last one, as in ``Edit``. The default is step 25 of 50.
        threshold: threshold of the maps for the masks of subjects. The maps are scaled from 0 to 1
            in each frame.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import ShareSettings
        >>> ShareSettings(layers=[1, 2], stop=0.4)
        ShareSettings(layers=[1, 2], start=0.04, stop=0.4, threshold=0.3)
    """

    layers: Layers = None
    start: int | float = 0.04
    stop: int | float = 0.5
    threshold: float = 0.3

    def __post_init__(self) -> None:
        check_window("ShareSettings", self.start, self.stop)
        check_number("ShareSettings", "threshold", self.threshold, *POSITIVE_SHARE)


SHARE = ShareSettings()
WORD_SWAP = ShareSettings(start=0, stop=2)  # another word in the prompt, the same layout
SUBJECT, REST = 1, 2  # bits of tokens; a query sees the keys that share a bit with it


def sharing_edits(
    pipe: Any,
    share: ShareSettings,
    sources: Sequence[tuple[int, int]],
    between: Sequence[tuple[int, int, float]],
    prompts: list[str],
    masks: Sequence[str] | None,
) -> list[Edit]:
    """Return the edits that share keys and values between segments."""
    (model, family), *_ = known_denoisers(pipe).values()
    paths = tuple(attention_layers(model, family))
    layers = share.layers
    if layers is None:
        layers = range(len(paths) - max(1, round(len(paths) / 6)), len(paths))
    chosen = sorted(paths.index(path) for path in Edit(layers=layers).place(paths, 1).strengths)
    window: dict[str, Any] = {"start": share.start, "stop": share.stop}
    # the last segment first, so that each one gives its original keys and values
    edits: list[Edit] = [
        ShareKV(source=source, samples=(sample,), layers=chosen, **window)
        for sample, source in reversed(sources)
    ]
    if masks is None:
        return edits
    if chosen[0] == 0:
        raise ValueError(
            f"share has layer {paths[0]}, and masks need a layer before those that share; leave "
            "this layer out"
        )
    words = [
        phrase_tokens(pipe.tokenizer, prompt, word)
        for prompt, word in zip(prompts, masks, strict=True)
    ]
    tokens = [
        tuple(dict.fromkeys((*words[a], *(words[b] if position else ()))))
        for a, b, position in between
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
        samples=tuple(sample for sample, _ in sources),
        **window,
    )
    return [*subjects.edits, *edits, mask]


def _query_bits(subjects: SubjectMasks, state: State) -> torch.Tensor:
    """Return the bits of the queries: SUBJECT for image tokens of the subject and for the text
    tokens that name it, REST for all others."""
    bits = torch.full((state.q.shape[0], state.q.shape[2]), REST)
    bits[:, state.image] = torch.where(subjects(state).cpu(), SUBJECT, REST)
    text = [position for first, end in state.texts for position in range(first, end)]
    for sample, tokens in enumerate(subjects.tokens if text else ()):
        bits[sample, [text[token] for token in tokens]] = SUBJECT
    return bits


def _key_bits(subjects: SubjectMasks, state: State) -> torch.Tensor:
    """Return the bits of the keys. Shared keys of a sample are those of the previous sample. Text
    keys have both bits."""
    bits = torch.full((state.k.shape[0], state.k.shape[2]), SUBJECT | REST)
    image_bits = torch.where(subjects(state).cpu(), SUBJECT, REST)
    bits[1:, state.image] = image_bits[:-1]
    return bits
