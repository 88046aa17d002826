"""An object of a reference in another scene by attention (PrimeComposer, Wang et al. 2024, arXiv
2403.05053)."""

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
    """The logits of an object are those of a reference: in its columns the keys are the
    reference's, in its rows the queries are. Values stay the composition's own.

    Args:
        source: the sample of the pass that is the reference; samples: who is composed.
        mask: which image tokens are the object, bool ``[image tokens]`` or ``[frames, height,
            width]``.
        source_mask: which tokens of the reference these are, as many in the same order; default:
            those at the same places. Keys and queries carry the rotary positions of the reference.
        rows: whether the object's rows are overwritten too.

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
                "ComposeObject(attention='cross'): objects are in the image; take attention='self'"
            )
        other = self.mask if self.source_mask is None else self.source_mask
        counts = [int((mask != 0).sum()) for mask in (self.mask, other)]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"ComposeObject has {counts[0]} tokens in mask and {counts[1]} in source_mask; "
                "they must be as many, and at least one"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        source = self.source
        self.check_source(state, source)
        to = self._places(state, self.mask)
        origin = to if self.source_mask is None else self._places(state, self.source_mask)
        heads = (strength > 0).to(state.k.device)[:, None, None]
        for name in ("k", "q") if self.rows else ("k",):
            own = getattr(state, name)
            new = own.clone()
            for sample in self.samples_in(state):
                given = own[source][:, origin]
                new[sample][:, to] = torch.where(heads, given, own[sample][:, to])
            setattr(state, name, new)

    def _places(self, state: State, mask: torch.Tensor) -> torch.Tensor:
        image = state.image
        if mask.numel() != image.stop - image.start:
            raise ValueError(
                f"ComposeObject has a mask of {mask.numel()} tokens, and {state.call.layer} has "
                f"{image.stop - image.start} of the image"
            )
        places: torch.Tensor = mask.flatten().nonzero()[:, 0] + image.start
        return places.to(state.q.device)


def region_constrained(
    tokens: Sequence[int],
    mask: torch.Tensor,
    *,
    attention: Literal["self", "cross"] = "cross",
    samples: tuple[int, ...] | None = None,
    start: int | float = 0,
    stop: int | float = 1.0,
) -> LabelBias:
    """Only the region of a subject sees its text tokens: the edit that has other image tokens not
    attend to them in the conditional pass, and in the perturbed one.

    Args:
        tokens: numbers of the subject's text tokens.
        mask: its region, bool ``[image tokens]`` or ``[frames, height, width]``.
        attention: ``cross``, or ``self`` where text is part of the sequence.
        samples, start, stop: as for an ``Edit``.

    Source:
        Wang et al. (2024), "PrimeComposer", arXiv 2403.05053.
    Default:
        paper.
    Differences:
        none
    """
    named = as_indices("region_constrained(tokens=...)", tokens)
    outside = (mask.flatten() == 0).to(torch.int64)

    def q_labels(state: State) -> torch.Tensor:
        image = state.image
        if len(outside) != image.stop - image.start:
            raise ValueError(
                f"region_constrained has a mask of {len(outside)} tokens, and {state.call.layer} "
                f"has {image.stop - image.start} of the image"
            )
        labels = torch.zeros(state.q.shape[2], dtype=torch.int64)
        labels[image] = outside.cpu()
        return labels

    def k_labels(state: State) -> torch.Tensor:
        labels = torch.zeros(state.k.shape[2], dtype=torch.int64)
        labels[text_keys(state, named).cpu()] = 1
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
    """The edits of PrimeComposer for ``steer``: the object's logits from a reference in the
    conditional pass of all layers, before ``stop`` (0.2 to 0.4 in the paper, 0.3 in one domain),
    and region-constrained attention to the text tokens of the object at all steps. The noised
    background outside the mask is the caller's to blend in, as by ``callback_on_step_end``.

    Args:
        source, samples, mask, source_mask: as for ``ComposeObject``.
        tokens: the object's text tokens; none: attention to text is as it is.
        attention: where text is: ``cross``, or ``self`` where it is part of the sequence.
        stop: the end of the composing.

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
