"""The attention of a source stream for that of another prompt, but for a word (MotionCLR, Chen et
al. 2024, arXiv 2410.18977)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import as_indices
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import attend
from visattn.guidance.edits.key_weights import text_keys, token_weights, weighed_values
from visattn.guidance.edits.query_edits import ReplaceQueries
from visattn.guidance.edits.share_keys import ShareKV
from visattn.guidance.edits.state import State, Stream

__all__ = ["ReplaceMap", "replace_motion"]


@dataclass(frozen=True, kw_only=True)
class ReplaceMap(Edit):
    """The map of samples is that of another sample of their pass, but for the columns of some text
    tokens, which stay: ``O_i = sum_j P'_ij v_j`` with ``P'_ij = P_ij`` for these tokens and the
    source's weight for the others, without renormalisation (prompt-to-prompt, Hertz et al. 2022,
    arXiv 2208.01626; MotionCLR, arXiv 2410.18977). Values stay the sample's own.

    Args:
        source: the sample whose map ``samples`` get.
        tokens: numbers of the text tokens whose columns stay, as those of an edited word; none: the
            whole map is the source's. Text tokens of both prompts are compared by number.

    The source's attention is computed once more with the sample's values, within the plan's
    pattern. Other edits of columns are listed after it, and go by the sample's own map.

    Source:
        Hertz et al. (2022), "Prompt-to-Prompt Image Editing with Cross-Attention Control", arXiv
        2208.01626. Chen et al. (2024), "MotionCLR", arXiv 2410.18977.
    Default:
        paper.
    Differences:
        - Text tokens of both prompts are compared by number.
    """

    source: int
    tokens: tuple[int, ...] = ()
    stage: ClassVar[str] = "columns"
    needs_lse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_indices("ReplaceMap(source=...)", self.source)
        tokens = as_indices("ReplaceMap(tokens=...)", self.tokens)
        object.__setattr__(self, "tokens", tuple(dict.fromkeys(tokens)))

    def apply(self, state: State, strength: torch.Tensor) -> None:
        source = self.source
        self.check_source(state, source)
        chosen = tuple(sample for sample in self.samples_in(state) if sample != source)
        if not chosen:
            return
        if state.borrowed:
            raise ValueError(
                f"ReplaceMap does not go with BorrowKeys, which gives {state.call.layer} keys that "
                "the source has not; leave one out of the layer"
            )
        other = _as_source(state, source, chosen)
        other.out, other.lse = attend(other, needs_lse=True, again=True)
        new = other.out
        if self.tokens:
            keys = text_keys(state, self.tokens)

            def weights(rows: slice, stream: Stream) -> torch.Tensor:
                own, given = (token_weights(s, keys, rows, stream) for s in (state, other))
                return own - given

            new = new + weighed_values(state, keys, self.stream, weights)
        replace(self, samples=chosen).change(state, "out", new, strength)


def _as_source(state: State, source: int, samples: tuple[int, ...]) -> State:
    """A call in which samples have the queries, keys, biases and gains of a source."""
    batch = state.q.shape[0]
    of = torch.arange(batch)
    of[list(samples)] = source

    def taken(own: torch.Tensor) -> torch.Tensor:
        return own.expand(batch, *own.shape[1:])[of.to(own.device)]

    biases = [
        replace(bias, q_labels=taken(bias.q_labels), k_labels=taken(bias.k_labels))
        for bias in state.biases
    ]
    gains = [(stream, first, end, taken(own)) for stream, first, end, own in state.gains]
    q, k = taken(state.q), taken(state.k)
    return State(state.call, state.part, state.pass_, q, k, state.v, biases, gains=gains)


def replace_motion(
    source: int,
    samples: tuple[int, ...],
    tokens: Sequence[int],
    *,
    attention: Literal["self", "cross"] = "cross",
    stop: int | float = 0.4,
    text_stop: int | float = 1.0,
) -> list[Edit]:
    """The edits of MotionCLR's replacement for ``steer``: another word of the prompt, in the motion
    of a source. In the conditional and the perturbed pass samples have the source's map of the
    image's attention to itself, and of that to text but for the edited word.

    Args:
        source: the sample with the prompt as it was; samples: those with another word.
        tokens: numbers of the edited word's tokens (``phrase_tokens``), at least one; the prompts
            have the same number of tokens before it.
        attention: ``cross``, or ``self`` where text is part of the sequence: there both are one
            map, which is replaced up to ``stop``.
        stop: the end of the self-attention's replacement; by default 4 steps of the paper's 10.
        text_stop: that of the cross-attention's.

    Raises:
        ValueError: no token is given.

    Source:
        Chen et al. (2024), "MotionCLR", arXiv 2410.18977.
    Default:
        paper.
    Differences:
        - The windows are shares of the steps; the paper has 10 steps.
    """
    named = as_indices("replace_motion(tokens=...)", tokens)
    if not named:
        raise ValueError(
            "replace_motion(tokens=()) names no token of the edited word; phrase_tokens(pipe."
            "tokenizer, prompt, word) finds them"
        )
    given: dict[str, Any] = {
        "source": source,
        "samples": samples,
        "passes": ("cond", "perturbed"),
    }
    if attention == "self":
        return [ReplaceMap(tokens=named, stop=stop, **given)]
    return [
        ReplaceQueries(stop=stop, **given),
        ShareKV(what="keys", stop=stop, **given),
        ReplaceMap(tokens=named, attention=attention, stop=text_stop, **given),
    ]
