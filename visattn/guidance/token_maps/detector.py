"""Detector guidance: subjects that were found keep to their place (Liu et al. 2023, arXiv
2306.02236)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn.attention import merge_attention
from visattn.guidance.edits.bias import Bias
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import logit_tensors
from visattn.guidance.edits.key_weights import text_keys
from visattn.guidance.edits.map_columns import row_chunks
from visattn.guidance.edits.query_edits import blur_matrix
from visattn.guidance.edits.read_tokens import ReadTokens, TextTokens, groups_of
from visattn.guidance.edits.state import State
from visattn.guidance.head_set import Heads, HeadSet, Layers
from visattn.guidance.token_maps.token_readout import TokenReadout, frame_minmax

__all__ = ["Detector", "DetectorGuidance", "largest_subject"]

Detector = Callable[[torch.Tensor, State], torch.Tensor]


def largest_subject(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """Masks from maps ``[samples, subjects, frames, height, width]``, which are scaled in each
    frame: where a subject has the largest of them and it reaches the threshold; bool."""
    scaled = frame_minmax(maps)
    largest, subject = scaled.max(1, keepdim=True)
    own = torch.arange(maps.shape[1], device=maps.device).reshape(1, -1, 1, 1, 1)
    return (subject == own) & (largest >= threshold)


class DetectorGuidance:
    """Inside the mask of a subject the conditional logits of its tokens are raised, outside they
    are those of the unconditional pass: ``S' = m (S + bias) + (1 - m) S_uncond``.

    Args:
        subjects: the text tokens of each subject, a number or several in brackets.
        masks: where the subjects are, from 0 to 1, ``[samples or 1, subjects, frames, height,
            width]``; then nothing is detected.
        detector: gets the maps ``[samples, subjects, frames, height, width]`` that the subjects had
            in the step before, and the State of the call; gives masks of this shape. A detector of
            another kind may look at what it likes instead, as at a prediction of the clean latents
            that ``callback_on_step_end`` kept. Default: ``largest_subject`` at ``threshold``.
        bias: what logits are raised by.
        sigma: of the Gaussian that masks are blurred with in each frame, in tokens (a value of
            ours), until ``blur_stop`` of the steps.
        every: share of the steps after which is detected anew. Where a subject was not found it is
            looked for at each step, and is left alone meanwhile.
        attention: ``cross``, or ``self`` where text is part of the sequence.
        layers, heads, start, stop: as for an ``Edit``; maps are read from the first step on.

    The unconditional logits are exact where both passes are in one call. Where they are calls of
    their own they are the products of the call's own queries and the unconditional keys of the
    last such call: text keys of cross-attention do not change from step to step, and queries are
    those of the unconditional pass until text comes in. A perturbed pass is guided as the
    conditional one.

    Maps are those of the conditional logits as they are without the guidance; in joint attention
    their normaliser is the guided one.

    ``steer(pipe, guidance.edits())`` makes it; it is for one generation at a time.

    Source:
        Liu et al. (2023), "Detector Guidance for Multi-Object Text-to-Image Generation", arXiv
        2306.02236.
    Default:
        paper.
    Differences:
        - The trained detector is replaced by thresholded maps, by masks of the caller or by a
          function.
        - ``sigma`` of the blur is a choice of this project.
    """

    def __init__(
        self,
        subjects: TextTokens,
        *,
        masks: torch.Tensor | None = None,
        detector: Detector | None = None,
        threshold: float = 0.3,
        bias: float = 0.7,
        sigma: float = 1.0,
        blur_stop: float = 0.6,
        every: float = 0.2,
        attention: Literal["self", "cross"] = "cross",
        layers: Layers | HeadSet = None,
        heads: Heads = None,
        start: int | float = 0.2,
        stop: int | float = 1.0,
    ) -> None:
        self.subjects = groups_of("DetectorGuidance(subjects=...)", subjects)
        if masks is not None and detector is not None:
            raise ValueError("DetectorGuidance has masks and a detector; give one of the two")
        if masks is not None and (masks.ndim != 5 or masks.shape[1] != len(self.subjects)):
            raise ValueError(
                f"DetectorGuidance(masks=...) has the shape {list(masks.shape)}; it must be "
                f"[samples or 1, {len(self.subjects)} subjects, frames, height, width]"
            )
        every_token = [token for group in self.subjects for token in group]
        if len(set(every_token)) < len(every_token):
            raise ValueError(
                f"DetectorGuidance(subjects={subjects!r}) has a token twice; each is of one subject"
            )
        self.masks, self.bias, self.sigma = masks, bias, sigma
        self.blur_stop, self.every = blur_stop, every
        self.detector = detector or (lambda maps, state: largest_subject(maps, threshold))
        self.tokens = tuple(every_token)
        self.readout = TokenReadout(keep=2)
        self.keys: dict[str, torch.Tensor] = {}  # unconditional ones of the tokens, by layer
        self.scope = {"attention": attention, "layers": layers, "heads": heads}
        self.window = {"start": start, "stop": stop}
        self._found: tuple[int, torch.Tensor] | None = None  # step of the detection, masks
        self._soft: tuple[int, torch.Tensor] | None = None

    def edits(self) -> list[Edit]:
        """The edits of a generation, without what an earlier one has left."""
        self.readout.clear()
        self.keys.clear()
        self._found = self._soft = None
        scope = {"attention": self.scope["attention"], "layers": self.scope["layers"]}
        cond = {**self.scope, **self.window, "passes": ("cond", "perturbed"), "stream": "image"}
        edits: list[Edit] = [
            _KeepKeys(owner=self, passes=("uncond",), **scope),  # type: ignore[arg-type]
            _WithoutTokens(owner=self, **cond),  # type: ignore[arg-type]
            _MixedTokens(owner=self, **cond),  # type: ignore[arg-type]
        ]
        if self.masks is None:
            edits.append(
                ReadTokens(
                    tokens=self.subjects,
                    sink=self.readout,
                    passes=("cond",),
                    **scope,  # type: ignore[arg-type]
                )
            )
        return edits

    def mask(self, state: State) -> torch.Tensor:
        """Where each token's subject is, ``[b, tokens, image tokens]``; NaN where it is nowhere."""
        step, steps = state.call.step, state.call.steps
        if step is None or steps is None:
            raise ValueError(
                "detector guidance goes by steps, and the step of this call is not known; steer "
                "the pipeline that runs"
            )
        if self._soft is None or self._soft[0] != step:
            found = self._detected(state, step, steps)
            soft = found if step >= self.blur_stop * steps else self._blurred(found)
            empty = found.flatten(2).sum(2) == 0
            soft = soft.masked_fill(empty[..., None, None, None], torch.nan).flatten(2)
            index = [n for n, group in enumerate(self.subjects) for _ in group]
            self._soft = step, soft[:, index].expand(state.q.shape[0], -1, -1)
        return self._soft[1]

    def _detected(self, state: State, step: int, steps: int) -> torch.Tensor:
        """The masks of a step, float32 ``[b or 1, subjects, T, H, W]``."""
        grid = state.call.layout.grids[0][1]
        device = state.q.device
        if self.masks is not None:
            found = self.masks
        else:
            if self._found is not None:
                since, last = self._found
                if step - since < self.every * steps and bool(last.flatten(2).sum(2).all()):
                    return last
            found = self.detector(self.readout.maps("cond", step - 1), state)
        shape = (len(self.subjects), *grid.shape)
        if found.shape[1:] != shape or found.shape[0] not in (1, state.q.shape[0]):
            raise ValueError(
                f"masks of subjects have the shape {list(found.shape)}, and {state.call.layer} has "
                f"{state.q.shape[0]} samples of {grid}: they must be [samples, "
                f"{', '.join(map(str, shape))}]"
            )
        found = found.to(device, torch.float32)
        if self.masks is None:
            self._found = step, found
        return found

    def _blurred(self, masks: torch.Tensor) -> torch.Tensor:
        if self.sigma == 0:
            return masks
        height, width = (blur_matrix(n, self.sigma, True).to(masks) for n in masks.shape[-2:])
        return height @ masks @ width.mT

    def unconditional(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of the image and keys of the tokens that the unconditional logits are of, ``[b,
        H, image tokens, D]`` and ``[b, H, tokens, D]``."""
        passes = state.call.passes or ()
        if "uncond" in passes:
            at, keys = passes.index("uncond"), text_keys(state, self.tokens)
            q, k = (x.chunk(len(passes))[at] for x in (state.call.q, state.call.k))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            return q[:, :, state.image], k[:, :, keys]
        kept = self.keys.get(state.call.layer)
        if kept is None:
            raise ValueError(
                f"detector guidance has no unconditional keys of {state.call.layer} yet; run with "
                "classifier-free guidance, and begin after the first step"
            )
        return state.q[:, :, state.image], kept


@dataclass(frozen=True, kw_only=True, eq=False)
class _KeepKeys(Edit):
    """Keeps the unconditional keys of the tokens."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "keys"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        kept = state.k[:, :, text_keys(state, self.owner.tokens)]
        self.owner.keys[state.call.layer] = kept


@dataclass(frozen=True, kw_only=True, eq=False)
class _WithoutTokens(Edit):
    """Has the kernel leave the tokens out for the image."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "bias"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        k_labels = torch.zeros(1, state.k.shape[2], dtype=torch.int64)
        k_labels[0, text_keys(state, self.owner.tokens).cpu()] = 1
        q_labels = torch.zeros(1, state.q.shape[2], dtype=torch.int64)
        q_labels[0, state.image] = 1
        table = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        state.biases.append(_LeftOut(table, q_labels, k_labels, strength > 0))


class _LeftOut(Bias):
    """The bias of tokens that are put in again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _MixedTokens(Edit):
    """Puts the tokens in again with the logits that they are to have."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "columns"
    needs_lse: ClassVar[bool] = True

    def apply(self, state: State, strength: torch.Tensor) -> None:
        assert state.lse is not None
        owner, factor, wide = self.owner, state.call.factor, state.lse.dtype
        keys = text_keys(state, owner.tokens)
        state.biases = [bias for bias in state.biases if not isinstance(bias, _LeftOut)]
        q, k = logit_tensors(state, state.image, "image")
        other_q, other_k = (x.to(wide) for x in owner.unconditional(state))
        mask = owner.mask(state).to(wide)
        q, k, v = q.to(wide), k[:, :, keys].to(wide), state.v[:, :, keys].to(wide)
        weight = strength.to(q)[None, :, None, None]
        heads = (strength > 0).to(q.device)[None, :, None]
        first, out, lse = state.image.start, state.out.clone(), state.lse.clone()
        for part in row_chunks(q, len(keys)):
            own = q[:, :, part] @ k.mT * factor
            other = other_q[:, :, part] @ other_k.mT * factor
            m = mask[:, None, :, part].mT
            mixed = m * (own + owner.bias) + (1 - m) * other
            logits = own + weight * (mixed.where(~m.isnan(), own) - own)
            rows = slice(first + part.start, first + part.stop)
            added, total = logits.softmax(-1) @ v, logits.logsumexp(-1)
            kernel = state.out[:, :, rows], state.lse[:, :, rows]
            merged = merge_attention([kernel[0].to(wide), added], [kernel[1], total])
            new = merged[0].to(out.dtype)
            chosen = heads & (kernel[1] > -torch.inf)  # what a plan skips stays 0
            out[:, :, rows] = torch.where(chosen[..., None], new, kernel[0])
            lse[:, :, rows] = torch.where(chosen, merged[1], kernel[1])
        state.out, state.lse = out, lse
