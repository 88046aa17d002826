"""Where the subjects of a batch of prompts are, each sample with its own words."""

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
    """Masks of the subject of each sample, from what its image tokens attend to the subject's words
    with: ``edits`` read it, and the object is a function of a call's State that gives bool ``[b,
    image tokens]``, as ``BorrowKeys(tokens=...)`` takes it.

    Args:
        tokens: the subject's text tokens, a group for each sample of a pass (``phrase_tokens``
            finds them); an empty one: the sample has no subject, and its mask is empty.
        attention: where text is: ``cross``, or ``self`` where it is part of the sequence.
        layers: that are read, as for an ``Edit``.
        threshold: of the maps scaled in each frame, or ``otsu``.
        when: ``before``: the masks of a step are those of the step before; ``now``: of the layers
            of the step that ran already.
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
                "SubjectMasks(tokens=...) has no token of any sample; phrase_tokens(pipe."
                "tokenizer, prompt, word) finds those of a word"
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
        if len(self.tokens) != state.q.shape[0]:
            raise ValueError(
                f"SubjectMasks(tokens=...) has {len(self.tokens)} groups, and a pass of "
                f"{state.call.layer} has {state.q.shape[0]} samples; give a group for each"
            )
        return torch.stack([masks(state) for masks in self._masks]).any(0)
