"""Detector guidance: keep the attention to each subject at the place where it was detected (Liu et
al. 2023, arXiv 2306.02236)."""

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
    """Return masks of subjects: the tokens where the map of the subject, scaled from 0 to 1 in each
    frame, is the largest of all subjects and reaches a threshold.

    Args:
        maps: maps ``[samples, subjects, frames, height, width]``.
        threshold: the threshold.

    Returns:
        bool, of the shape of ``maps``.
    """
    scaled = frame_minmax(maps)
    largest, subject = scaled.max(1, keepdim=True)
    subjects = torch.arange(maps.shape[1], device=maps.device).reshape(1, -1, 1, 1, 1)
    return (subject == subjects) & (largest >= threshold)


class DetectorGuidance:
    """Raise the conditional logits of the tokens of each subject inside its mask, and replace them
    by the unconditional logits outside: ``S' = m (S + bias) + (1 - m) S_uncond``.

    ``steer(pipe, guidance.edits())`` applies it to one generation. Call ``edits`` again for the
    next generation.

    The unconditional logits are exact if both passes are in one call of the denoiser. If each pass
    is a call, they are computed from the queries of the call itself and the unconditional keys of
    the previous unconditional call: text keys of cross-attention do not change from step to step,
    and the queries equal those of the unconditional pass until text enters. A perturbed pass is
    guided like the conditional one.

    The maps are those of the conditional logits without the guidance. In joint attention they are
    normalised over the guided logits.

    Args:
        subjects: the text tokens of each subject, an index or a group of indices.
        masks: masks of the subjects, from 0 to 1, ``[samples or 1, subjects, frames, height,
            width]``. Nothing is then detected.
        detector: a function of the subjects' maps in the previous step, ``[samples, subjects,
            frames, height, width]``, and of the call's State, that returns masks of this shape. It
            may ignore the maps, and use for example a prediction of the clean latents that
            ``callback_on_step_end`` stored. None means ``largest_subject`` at ``threshold``.
        threshold: threshold of the scaled maps.
        bias: what is added to the logits inside the mask.
        sigma: standard deviation in tokens of the Gaussian that blurs the masks in each frame, a
            choice of this project. 0 means no blur.
        blur_stop: share of the steps after which the masks are not blurred.
        every: share of the steps after which subjects are detected again. A subject without a mask
            is detected at each step, and not guided until then.
        attention: how the model attends to text: ``cross``, or ``self`` if text is part of the
            sequence.
        layers: layers with the guidance, as in ``Edit``.
        heads: heads with the guidance, as in ``Edit``.
        start: the first step with the guidance, as in ``Edit``. Maps are read from step 0 on.
        stop: the step after the last one with the guidance, as in ``Edit``.

    Raises:
        TypeError: an index is no integer.
        ValueError: an argument is out of range, both masks and a detector are given, or two
            subjects have the same token.

    Example:
        >>> from visattn import steer
        >>> from visattn.guidance import DetectorGuidance
        >>> guidance = DetectorGuidance(subjects=[2, 5], start=1)
        >>> with steer(pipe, guidance.edits()):
        ...     video = pipe("a red square a blue circle", height=16, width=16, num_frames=5,
        ...                  num_inference_steps=2, guidance_scale=5.0)

    Source:
        Liu et al. (2023), "Detector Guidance for Multi-Object Text-to-Image Generation", arXiv
        2306.02236.
    Default:
        paper.
    Differences:
        - Thresholded maps, masks of the caller or a function replace the trained detector.
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
            raise ValueError("DetectorGuidance has masks and a detector; give only one of them")
        if masks is not None and (masks.ndim != 5 or masks.shape[1] != len(self.subjects)):
            raise ValueError(
                f"DetectorGuidance(masks=...) has the shape {list(masks.shape)}; it must be "
                f"[samples or 1, {len(self.subjects)} subjects, frames, height, width]"
            )
        all_tokens = [token for group in self.subjects for token in group]
        if len(set(all_tokens)) < len(all_tokens):
            raise ValueError(
                f"DetectorGuidance(subjects={subjects!r}) has a token twice; give each token once"
            )
        self.masks, self.bias, self.sigma = masks, bias, sigma
        self.blur_stop, self.every = blur_stop, every
        self.detector = detector or (lambda maps, state: largest_subject(maps, threshold))
        self.tokens = tuple(all_tokens)
        self.readout = TokenReadout(keep=2)
        self.keys: dict[str, torch.Tensor] = {}  # unconditional keys of the tokens, by layer
        self.scope = {"attention": attention, "layers": layers, "heads": heads}
        self.window = {"start": start, "stop": stop}
        self._detection: tuple[int, torch.Tensor] | None = None  # its step, and the masks
        self._token_masks: tuple[int, torch.Tensor] | None = None  # their step, and the masks

    def edits(self) -> list[Edit]:
        """Return the edits for a generation. The state of the previous generation is dropped."""
        self.readout.clear()
        self.keys.clear()
        self._detection = self._token_masks = None
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
        """Return the mask of the subject of each token.

        Args:
            state: the call.

        Returns:
            The masks ``[b, tokens, image tokens]``, with NaN for subjects that were not detected.

        Raises:
            ValueError: the step of the call is not known.
        """
        step, steps = state.call.step, state.call.steps
        if step is None or steps is None:
            raise ValueError(
                "DetectorGuidance needs the step of the call, which is not known; steer the "
                "pipeline that runs"
            )
        if self._token_masks is None or self._token_masks[0] != step:
            masks = self._subject_masks(state, step, steps)
            soft = masks if step >= self.blur_stop * steps else self._blurred(masks)
            empty = masks.flatten(2).sum(2) == 0
            soft = soft.masked_fill(empty[..., None, None, None], torch.nan).flatten(2)
            index = [n for n, group in enumerate(self.subjects) for _ in group]
            self._token_masks = step, soft[:, index].expand(state.q.shape[0], -1, -1)
        return self._token_masks[1]

    def _subject_masks(self, state: State, step: int, steps: int) -> torch.Tensor:
        """Return the masks of a step, float32 ``[b or 1, subjects, frames, height, width]``."""
        grid = state.call.layout.grids[0][1]
        device = state.q.device
        if self.masks is not None:
            masks = self.masks
        else:
            if self._detection is not None:
                since, last = self._detection
                if step - since < self.every * steps and bool(last.flatten(2).sum(2).all()):
                    return last
            masks = self.detector(self.readout.maps("cond", step - 1), state)
        shape = (len(self.subjects), *grid.shape)
        if masks.shape[1:] != shape or masks.shape[0] not in (1, state.q.shape[0]):
            raise ValueError(
                f"masks of subjects have the shape {list(masks.shape)}, and {state.call.layer} has "
                f"{state.q.shape[0]} samples of {grid}: they must be [samples, "
                f"{', '.join(map(str, shape))}]"
            )
        masks = masks.to(device, torch.float32)
        if self.masks is None:
            self._detection = step, masks
        return masks

    def _blurred(self, masks: torch.Tensor) -> torch.Tensor:
        """Return masks blurred in each frame."""
        if self.sigma == 0:
            return masks
        height, width = (blur_matrix(n, self.sigma, True).to(masks) for n in masks.shape[-2:])
        return height @ masks @ width.mT

    def unconditional(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and keys of the unconditional logits.

        Args:
            state: the call.

        Returns:
            Queries of the image ``[b, H, image tokens, D]`` and keys of the subjects' tokens ``[b,
            H, tokens, D]``.

        Raises:
            ValueError: no unconditional pass ran before.
        """
        passes = state.call.passes or ()
        if "uncond" in passes:
            uncond, keys = passes.index("uncond"), text_keys(state, self.tokens)
            q, k = (x.chunk(len(passes))[uncond] for x in (state.call.q, state.call.k))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            return q[:, :, state.image], k[:, :, keys]
        kept = self.keys.get(state.call.layer)
        if kept is None:
            raise ValueError(
                f"DetectorGuidance has no unconditional keys of {state.call.layer} yet; run with "
                "classifier-free guidance, and start after the first step"
            )
        return state.q[:, :, state.image], kept


@dataclass(frozen=True, kw_only=True, eq=False)
class _KeepKeys(Edit):
    """Store the unconditional keys of the subjects' tokens."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "keys"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        kept = state.k[:, :, text_keys(state, self.owner.tokens)]
        self.owner.keys[state.call.layer] = kept


@dataclass(frozen=True, kw_only=True, eq=False)
class _WithoutTokens(Edit):
    """Exclude the subjects' tokens from the image rows of the kernel stage."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "bias"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        k_labels = torch.zeros(1, state.k.shape[2], dtype=torch.int64)
        k_labels[0, text_keys(state, self.owner.tokens).cpu()] = 1
        q_labels = torch.zeros(1, state.q.shape[2], dtype=torch.int64)
        q_labels[0, state.image] = 1
        table = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        state.biases.append(_ExcludedTokens(table, q_labels, k_labels, strength > 0))


class _ExcludedTokens(Bias):
    """The bias that excludes the tokens, which ``_MixedTokens`` adds again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _MixedTokens(Edit):
    """Add the subjects' tokens again, with the guided logits."""

    owner: DetectorGuidance
    stage: ClassVar[str] = "columns"
    needs_lse: ClassVar[bool] = True

    def apply(self, state: State, strength: torch.Tensor) -> None:
        assert state.lse is not None
        owner, factor, acc_dtype = self.owner, state.call.factor, state.lse.dtype
        keys = text_keys(state, owner.tokens)
        state.biases = [bias for bias in state.biases if not isinstance(bias, _ExcludedTokens)]
        q, k = logit_tensors(state, state.image, "image")
        uncond_q, uncond_k = (x.to(acc_dtype) for x in owner.unconditional(state))
        mask = owner.mask(state).to(acc_dtype)
        q, k = q.to(acc_dtype), k[:, :, keys].to(acc_dtype)
        v = state.v[:, :, keys].to(acc_dtype)
        weight = strength.to(q)[None, :, None, None]
        heads = (strength > 0).to(q.device)[None, :, None]
        first, out, lse = state.image.start, state.out.clone(), state.lse.clone()
        for chunk in row_chunks(q, len(keys)):
            cond = q[:, :, chunk] @ k.mT * factor
            uncond = uncond_q[:, :, chunk] @ uncond_k.mT * factor
            m = mask[:, None, :, chunk].mT
            guided = m * (cond + owner.bias) + (1 - m) * uncond
            logits = cond + weight * (guided.where(~m.isnan(), cond) - cond)
            rows = slice(first + chunk.start, first + chunk.stop)
            token_out, token_lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
            rest_out, rest_lse = state.out[:, :, rows], state.lse[:, :, rows]
            merged_out, merged_lse = merge_attention(
                [rest_out.to(acc_dtype), token_out], [rest_lse, token_lse]
            )
            chosen = heads & (rest_lse > -torch.inf)  # heads that a plan skips stay 0
            out[:, :, rows] = torch.where(chosen[..., None], merged_out.to(out.dtype), rest_out)
            lse[:, :, rows] = torch.where(chosen, merged_lse, rest_lse)
        state.out, state.lse = out, lse
