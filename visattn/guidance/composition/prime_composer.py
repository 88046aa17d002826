"""Place the object of a reference in another scene by attention (PrimeComposer, Wang et al. 2024,
arXiv 2403.05053)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn._arguments import as_indices
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.key_weights import text_keys
from visattn.guidance.edits.label_bias import LabelBias
from visattn.guidance.edits.state import State, Stream

__all__ = ["ComposeObject", "prime_composer", "region_constrained"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ComposeObject(Edit):
    """Replace the logits of an object by those of a reference sample: the keys in the columns of
    the object and the queries in its rows are the reference's. Values stay the composition's own.

    Args:
        source: index of the sample of the pass that is the reference.
        mask: the image tokens of the object, bool ``[image tokens]`` or ``[frames, height,
            width]``.
        source_mask: the corresponding tokens of the reference, as many and in the same order, of
            one of these shapes. None means those at the same places. Keys and queries keep the
            rotary positions of the reference.
        rows: whether to replace the queries of the object too.

    The other arguments are those of ``Edit``; ``samples`` are the compositions.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the masks have different numbers of tokens; or,
            at an attention call, a mask has not the number of image tokens.

    Example:
        >>> import torch
        >>> from visattn.guidance import ComposeObject, steer
        >>> object_tokens = torch.tensor([True, False])  # of the two tokens of this tiny video
        >>> with steer(pipe, ComposeObject(source=0, samples=[1], mask=object_tokens)):
        ...     videos = pipe(["a red cat", "a room"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

    Source:
        Wang et al. (2024), "PrimeComposer", arXiv 2403.05053.
    Default:
        paper.
    Differences:
        - The code overwrites logits; here keys and queries are replaced, which gives the same
          logits.
    """

    source: int
    mask: torch.Tensor
    source_mask: torch.Tensor | None = None
    rows: bool = True
    stage: ClassVar[str] = "keys"
    streams: ClassVar[tuple[Stream, ...]] = ("all",)
    partial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention == "cross":
            raise ValueError(
                "ComposeObject(attention='cross') is not possible: objects are image tokens, and "
                "the keys of cross-attention are text; use attention='self'"
            )
        other = self.mask if self.source_mask is None else self.source_mask
        counts = [int((mask != 0).sum()) for mask in (self.mask, other)]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"ComposeObject has {counts[0]} tokens in mask and {counts[1]} in source_mask; "
                "both must have the same number, at least one"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        source = self.source
        self.check_source(state, source)
        target = self._positions(state, self.mask)
        origin = target
        if self.source_mask is not None:
            origin = self._positions(state, self.source_mask)
        heads = (strength > 0).to(state.k.device)[:, None, None]
        for name in ("k", "q") if self.rows else ("k",):
            old = getattr(state, name)
            new = old.clone()
            for sample in self.samples_in(state):
                from_source = old[source][:, origin]
                new[sample][:, target] = torch.where(heads, from_source, old[sample][:, target])
            setattr(state, name, new)

    def _positions(self, state: State, mask: torch.Tensor) -> torch.Tensor:
        """Return the positions of the tokens of a mask in the sequence, int64."""
        image = state.image
        if mask.numel() != image.stop - image.start:
            raise ValueError(
                f"ComposeObject has a mask of {mask.numel()} tokens, and {state.call.layer} has "
                f"{image.stop - image.start} image tokens"
            )
        positions: torch.Tensor = mask.flatten().nonzero()[:, 0] + image.start
        return positions.to(state.q.device)


def region_constrained(
    tokens: Sequence[int],
    mask: torch.Tensor,
    *,
    attention: Literal["self", "cross"] = "cross",
    samples: tuple[int, ...] | None = None,
    start: int | float = 0,
    stop: int | float = 1.0,
) -> LabelBias:
    """Return the edit of region-constrained attention: image tokens outside the region of a subject
    do not attend to the subject's text tokens, in the conditional and the perturbed pass.

    Args:
        tokens: indices of the text tokens of the subject.
        mask: the region, bool ``[image tokens]`` or ``[frames, height, width]``.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence.
        samples: indices of the samples of a pass, as in ``Edit``. None means all.
        start: the first step, as in ``Edit``.
        stop: the step after the last one, as in ``Edit``.

    Returns:
        The edit, for ``steer``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from visattn.guidance import region_constrained, steer
        >>> region = torch.tensor([True, False])  # of the two tokens of this tiny video
        >>> with steer(pipe, region_constrained(tokens=[1], mask=region)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Wang et al. (2024), "PrimeComposer", arXiv 2403.05053.
    Default:
        paper.
    Differences:
        none
    """
    subject_tokens = as_indices("region_constrained(tokens=...)", tokens)
    outside = (mask.flatten() == 0).to(torch.int64)

    def q_labels(state: State) -> torch.Tensor:
        image = state.image
        if len(outside) != image.stop - image.start:
            raise ValueError(
                f"region_constrained has a mask of {len(outside)} tokens, and {state.call.layer} "
                f"has {image.stop - image.start} image tokens"
            )
        labels = torch.zeros(state.q.shape[2], dtype=torch.int64)
        labels[image] = outside.cpu()
        return labels

    def k_labels(state: State) -> torch.Tensor:
        labels = torch.zeros(state.k.shape[2], dtype=torch.int64)
        labels[text_keys(state, subject_tokens).cpu()] = 1
        return labels

    return LabelBias(
        table=torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]),
        q_labels=q_labels,
        k_labels=k_labels,
        attention=attention,
        passes=("cond", "perturbed"),
        samples=samples,
        start=start,
        stop=stop,
    )


def prime_composer(
    source: int,
    samples: tuple[int, ...],
    mask: torch.Tensor,
    *,
    source_mask: torch.Tensor | None = None,
    tokens: Sequence[int] = (),
    attention: Literal["self", "cross"] = "cross",
    stop: int | float = 0.3,
) -> list[Edit]:
    """Return the edits of PrimeComposer. Before ``stop``, the object has the logits of a reference
    in all layers of the conditional pass. At all steps, only its region attends to its text tokens.

    The caller blends the noised background outside the mask into the latents, for example in
    ``callback_on_step_end``.

    Args:
        source: index of the sample of the pass that is the reference.
        samples: indices of the samples that are composed.
        mask: the image tokens of the object, as in ``ComposeObject``.
        source_mask: the corresponding tokens of the reference, as in ``ComposeObject``.
        tokens: indices of the text tokens of the object. If empty, attention to text does not
            change.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence.
        stop: the end of the composition, as in ``Edit``. The paper uses 0.2 to 0.4 of the steps,
            and 0.3 within one domain.

    Returns:
        The edits, for ``steer``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from visattn.guidance import prime_composer, steer
        >>> object_tokens = torch.tensor([True, False])  # of the two tokens of this tiny video
        >>> edits = prime_composer(source=0, samples=(1,), mask=object_tokens, tokens=[1])
        >>> with steer(pipe, edits):
        ...     videos = pipe(["a red cat", "a cat outside"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

    Source:
        Wang et al. (2024), "PrimeComposer", arXiv 2403.05053.
    Default:
        paper. The released code often leaves the list of tokens empty.
    Differences:
        - Blending of the background is the caller's.
    """
    edits: list[Edit] = [
        ComposeObject(
            source=source,
            samples=samples,
            mask=mask,
            source_mask=source_mask,
            passes=("cond", "perturbed"),
            stop=stop,
        )
    ]
    if tokens:
        edits.append(region_constrained(tokens, mask, attention=attention, samples=samples))
    return edits
