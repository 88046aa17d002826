"""Masks of the subjects of a batch of prompts, from the attention to the subjects' words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from visattn._arguments import as_indices
from visattn.guidance.edits.read_tokens import ReadTokens
from visattn.guidance.edits.state import State
from visattn.guidance.head_set import HeadSet, Layers
from visattn.guidance.token_maps.token_readout import Threshold, TokenReadout, When

__all__ = ["SubjectMasks"]


class SubjectMasks:
    """Masks of the subject of each sample, from the attention of image tokens to the words of the
    subject.

    Give ``edits`` to ``steer``; they read the attention. The object itself is a function of a
    call's State that returns the masks, bool ``[b, image tokens]``, as ``BorrowKeys(tokens=...)``
    takes it.

    Args:
        tokens: the text tokens of the subject, a group of indices for each sample of a pass
            (``phrase_tokens`` finds them). An empty group means that the sample has no subject; its
            mask is empty.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence.
        layers: the layers to read, as in ``Edit``.
        threshold: threshold of the maps, which are scaled from 0 to 1 in each frame, or ``otsu``
            for Otsu's threshold of the unscaled maps.
        when: ``before`` for masks from the previous step, or ``now`` for masks from the layers of
            the current step that already ran.

    Attributes:
        edits: the edits that read the attention.

    Raises:
        TypeError: an index is no integer.
        ValueError: no sample has a token, or ``when`` has another value.

    Example:
        >>> from visattn.guidance import BorrowKeys, SubjectMasks, phrase_tokens, steer
        >>> prompts = ["a red square", "a blue square"]
        >>> words = [phrase_tokens(pipe.tokenizer, prompt, "square") for prompt in prompts]
        >>> subjects = SubjectMasks(words, attention="cross")
        >>> borrow = BorrowKeys(sources=[0], samples=[1], tokens=subjects, start=1)
        >>> with steer(pipe, [*subjects.edits, borrow]):
        ...     videos = pipe(prompts, height=16, width=16, num_frames=5, num_inference_steps=2)
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        attention: Literal["self", "cross"],
        layers: Layers | HeadSet = None,
        threshold: Threshold = 0.3,
        when: When = "before",
    ) -> None:
        self.tokens = tuple(as_indices("SubjectMasks(tokens=...)", group) for group in tokens)
        if not any(self.tokens):
            raise ValueError(
                "SubjectMasks(tokens=...) has no token of any sample; find those of a word with "
                "phrase_tokens(pipe.tokenizer, prompt, word)"
            )
        self.edits: list[ReadTokens] = []
        self._masks = []
        for sample, group in enumerate(self.tokens):
            if group:
                sink = TokenReadout(keep=2)
                edit = ReadTokens(
                    tokens=(group,),
                    sink=sink,
                    layers=layers,
                    attention=attention,
                    passes=("cond",),
                    samples=(sample,),
                )
                self.edits.append(edit)
                self._masks.append(sink.masks(0, threshold, when=when))

    def __call__(self, state: State) -> torch.Tensor:
        """Return the masks at a call, bool ``[b, image tokens]``."""
        if len(self.tokens) != state.q.shape[0]:
            raise ValueError(
                f"SubjectMasks(tokens=...) has {len(self.tokens)} groups, and a pass of "
                f"{state.call.layer} has {state.q.shape[0]} samples; give a group for each sample"
            )
        return torch.stack([masks(state) for masks in self._masks]).any(0)
