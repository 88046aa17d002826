"""Attention moved towards a target: the identity, the mean, the mean query (P1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch

from visattn.attention.dense_attention import dense_with_lse
from visattn.guidance.edits.bias import FORBIDDEN
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import logit_tensors
from visattn.guidance.edits.state import State

__all__ = ["Perturb", "Target"]

Target = Literal["value", "mean", "mean_query", "self_and_text", "self_for_image"]
OF_IMAGE = ("self_and_text", "self_for_image")  # targets of image rows
CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Perturb(Edit):
    """``O_h <- (1 - u_h) O_h + u_h target_h`` (SoftPAG, Ahn et al. 2025, arXiv 2506.10978).

    Args:
        target: what attention is moved towards.
            ``value``: the token's own value, attention being the identity (PAG, Ahn et al. 2024,
            arXiv 2403.17377).
            ``mean``: the mean of all values, attention being uniform.
            ``mean_query``: the row of the mean query of the stream (SEG for infinite sigma, Hong
            2024, arXiv 2408.00760).
            ``self_and_text``: for image rows of joint attention, the softmax over all text keys and
            the token itself.
            ``self_for_image``: the same rows, the weights of the text kept and those of the image
            given to the token itself.
            Where a layer has no text tokens, the last two are the token's own value.

    Source:
        Ahn et al. (2025), "Where and How to Perturb", arXiv
        2506.10978. Code: github.com/cvlab-kaist/HeadHunter (commit 3828d1c).
    Default:
        code.
    Differences:
        - The targets ``self_and_text`` and ``self_for_image`` are restricted identities of the same
          code.
    """

    target: Target = "value"
    example: ClassVar[str] = "Perturb(layers=[3], passes=['uncond'])"
    stage: ClassVar[str] = "lerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in get_args(Target):
            raise ValueError(
                f"Perturb(target={self.target!r}) must be one of {', '.join(get_args(Target))}"
            )
        if self.attention == "cross" and self.target in get_args(Target)[:1] + get_args(Target)[3:]:
            raise ValueError(
                f"Perturb(target={self.target!r}) is of queries that are keys too, and those of "
                "cross-attention are not; take mean or mean_query"
            )
        if self.target in OF_IMAGE and self.stream == "text":
            raise ValueError(
                f"Perturb(target={self.target!r}, stream='text') must be of image rows; leave "
                "stream out"
            )

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        return self.target == "self_for_image"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.target in OF_IMAGE:
            edit = replace(self, stream="image")
            new = self._of_image(state) if state.texts else state.v.expand_as(state.out)
            edit.change(state, "out", new, strength)
            return
        if self.target == "value":
            new = state.v
        elif self.target == "mean":
            new = state.v.mean(2, keepdim=True)
        else:
            rows = torch.cat([state.q[:, :, part] for part in state.rows(self.stream)], 2)
            new, _ = dense_with_lse(rows.mean(2, keepdim=True), state.k, state.v, state.call.factor)
        self.change(state, "out", new.expand_as(state.out), strength)

    def _of_image(self, state: State) -> torch.Tensor:
        """The target of the image rows, beside the output of the others."""
        rows, factor = state.image, state.call.factor
        text = torch.cat([torch.arange(a, b, device=state.q.device) for a, b in state.texts])
        queries, keys = logit_tensors(state, rows, "image")
        k_text, v_text = keys[:, :, text], state.v[:, :, text]
        out = state.out.clone()
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        step = max(1, CHUNK // max(1, out.shape[0] * out.shape[1] * len(text)))
        for first in range(rows.start, rows.stop, step):
            part = slice(first, min(first + step, rows.stop))
            q = queries[:, :, first - rows.start : part.stop - rows.start].to(wide)
            v = state.v[:, :, part].to(wide)
            logits = q @ k_text.to(wide).mT * factor
            if self.target == "self_and_text":
                own = (q * keys[:, :, part].to(wide)).sum(-1, keepdim=True) * factor
                gone = torch.cat([logits, own], -1).amax(-1, keepdim=True) < -FORBIDDEN / 2
                weights = torch.cat([logits, own.masked_fill(gone, 0.0)], -1).softmax(-1)
                new = weights[..., :-1] @ v_text.to(wide) + weights[..., -1:] * v
            else:
                weights = (logits - state.normaliser(part)[..., None].to(wide)).exp()
                new = weights @ v_text.to(wide) + (1 - weights.sum(-1, keepdim=True)) * v
            out[:, :, part] = new.to(out.dtype)
        return out
