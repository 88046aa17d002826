"""Replace the attention map of a sample by that of another one, except for the columns of an edited
word (MotionCLR, Chen et al. 2024, arXiv 2410.18977)."""

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
    """Replace the attention map of samples by that of another sample of their pass, except for the
    columns of some text tokens (prompt-to-prompt, Hertz et al. 2022, arXiv 2208.01626; MotionCLR,
    arXiv 2410.18977): ``O_i = sum_j P'_ij v_j``, where ``P'_ij`` is the sample's own ``P_ij`` for
    these tokens and the weight of the source for all others, without renormalisation. The values
    stay the sample's own.

    The attention of the source is computed once more with the values of the sample, with the
    pattern of the plan. List other edits of columns after this one; they use the sample's own map.

    Args:
        source: index of the sample whose map the ``samples`` get.
        tokens: indices of the text tokens whose columns stay, such as those of an edited word. An
            empty tuple replaces the whole map. Text tokens of both prompts are matched by index.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, a pass has no such sample
            or token, or ``BorrowKeys`` edits the same layer.

    Example:
        >>> from visattn.guidance import ReplaceMap, steer
        >>> with steer(pipe, ReplaceMap(source=0, samples=[1], attention="cross")):
        ...     videos = pipe(["a red cat", "a blue cat"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

    Source:
        Hertz et al. (2022), "Prompt-to-Prompt Image Editing with Cross-Attention Control", arXiv
        2208.01626. Chen et al. (2024), "MotionCLR", arXiv 2410.18977.
    Default:
        paper.
    Differences:
        - Text tokens of both prompts are matched by index.
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
                f"ReplaceMap cannot be combined with BorrowKeys, which gives {state.call.layer} "
                "keys that the source does not have; leave one of them out of the layer"
            )
        source_state = _as_source(state, source, chosen)
        source_state.out, source_state.lse = attend(source_state, needs_lse=True, again=True)
        new = source_state.out
        if self.tokens:
            keys = text_keys(state, self.tokens)

            def weights(rows: slice, stream: Stream) -> torch.Tensor:
                sample_weights = token_weights(state, keys, rows, stream)
                return sample_weights - token_weights(source_state, keys, rows, stream)

            new = new + weighed_values(state, keys, self.stream, weights)
        replace(self, samples=chosen).change(state, "out", new, strength)


def _as_source(state: State, source: int, samples: tuple[int, ...]) -> State:
    """Return a state in which samples have the queries, keys, biases and gains of a source."""
    batch = state.q.shape[0]
    taken_from = torch.arange(batch)
    taken_from[list(samples)] = source

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(batch, *tensor.shape[1:])[taken_from.to(tensor.device)]

    biases = [
        replace(bias, q_labels=taken(bias.q_labels), k_labels=taken(bias.k_labels))
        for bias in state.biases
    ]
    gains = [(stream, first, end, taken(factor)) for stream, first, end, factor in state.gains]
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
    """Return the edits of MotionCLR that replace a word of the prompt and keep the motion of a
    source sample. In the conditional and the perturbed pass, the samples get the self-attention map
    of the source, and its map of attention to text except for the columns of the edited word.

    Args:
        source: index of the sample with the original prompt.
        samples: indices of the samples whose prompts have another word.
        tokens: indices of the text tokens of the edited word (``phrase_tokens`` finds them), at
            least one. The prompts must have the same number of tokens before the word.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence. Then both maps are one, which is replaced until ``stop``.
        stop: the end of the replacement of self-attention, as in ``Edit``. The default is 4 of the
            10 steps of the paper.
        text_stop: the end of the replacement of cross-attention, as in ``Edit``.

    Returns:
        The edits, for ``steer``.

    Raises:
        ValueError: ``tokens`` is empty.

    Example:
        >>> from visattn.guidance import replace_motion, steer
        >>> with steer(pipe, replace_motion(source=0, samples=(1,), tokens=(1,))):
        ...     videos = pipe(["a red cat", "a blue cat"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

    Source:
        Chen et al. (2024), "MotionCLR", arXiv 2410.18977.
    Default:
        paper.
    Differences:
        - The windows are shares of the steps; the paper has 10 steps.
    """
    word_tokens = as_indices("replace_motion(tokens=...)", tokens)
    if not word_tokens:
        raise ValueError(
            "replace_motion(tokens=()) names no token of the edited word; find them with "
            "phrase_tokens(pipe.tokenizer, prompt, word)"
        )
    shared: dict[str, Any] = {
        "source": source,
        "samples": samples,
        "passes": ("cond", "perturbed"),
    }
    if attention == "self":
        return [ReplaceMap(tokens=word_tokens, stop=stop, **shared)]
    return [
        ReplaceQueries(stop=stop, **shared),
        ShareKV(what="keys", stop=stop, **shared),
        ReplaceMap(tokens=word_tokens, attention=attention, stop=text_stop, **shared),
    ]
