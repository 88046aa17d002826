"""Interpolate attention towards a target: the identity, the mean, or the mean query."""

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
OF_IMAGE = ("self_and_text", "self_for_image")  # targets that exist for image rows only
CHUNK = 1 << 22  # logits that are computed at a time


@dataclass(frozen=True, kw_only=True)
class Perturb(Edit):
    """Interpolate the attention of heads towards a target: ``O_h <- (1 - u_h) O_h + u_h target_h``,
    where ``u_h`` is the strength of the head (SoftPAG, Ahn et al. 2025, arXiv 2506.10978).

    Args:
        target: the attention at strength 1.
            ``value``: the value of the token itself, that is, the identity as attention map (PAG,
            Ahn et al. 2024, arXiv 2403.17377).
            ``mean``: the mean of all values, that is, uniform attention.
            ``mean_query``: the attention of the mean query of the stream (SEG with infinite sigma,
            Hong 2024, arXiv 2408.00760).
            ``self_and_text``: for image rows of joint attention, a softmax over all text keys and
            the token itself.
            ``self_for_image``: for image rows of joint attention, the text keeps its weights, and
            the token itself gets the weight of the whole image.
            In layers without text tokens the last two equal ``value``.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import Perturb, steer
        >>> with steer(pipe, Perturb(layers=[1], heads={0: 0.5}, passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
                f"Perturb(target={self.target!r}) needs queries that are keys too, which "
                "cross-attention does not have; use target='mean' or 'mean_query'"
            )
        if self.target in OF_IMAGE and self.stream == "text":
            raise ValueError(
                f"Perturb(target={self.target!r}, stream='text') is not possible: the target "
                "exists for image rows only; leave stream out"
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
        """Return the output with the target in the image rows."""
        rows, factor = state.image, state.call.factor
        text = torch.cat([torch.arange(a, b, device=state.q.device) for a, b in state.texts])
        queries, keys = logit_tensors(state, rows, "image")
        k_text, v_text = keys[:, :, text], state.v[:, :, text]
        out = state.out.clone()
        acc_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        step = max(1, CHUNK // max(1, out.shape[0] * out.shape[1] * len(text)))
        for first in range(rows.start, rows.stop, step):
            chunk = slice(first, min(first + step, rows.stop))
            q = queries[:, :, first - rows.start : chunk.stop - rows.start].to(acc_dtype)
            v = state.v[:, :, chunk].to(acc_dtype)
            logits = q @ k_text.to(acc_dtype).mT * factor
            if self.target == "self_and_text":
                to_self = (q * keys[:, :, chunk].to(acc_dtype)).sum(-1, keepdim=True) * factor
                # rows whose keys are all forbidden see their own token
                keyless = torch.cat([logits, to_self], -1).amax(-1, keepdim=True) < -FORBIDDEN / 2
                weights = torch.cat([logits, to_self.masked_fill(keyless, 0.0)], -1).softmax(-1)
                new = weights[..., :-1] @ v_text.to(acc_dtype) + weights[..., -1:] * v
            else:
                weights = (logits - state.normaliser(chunk)[..., None].to(acc_dtype)).exp()
                new = weights @ v_text.to(acc_dtype) + (1 - weights.sum(-1, keepdim=True)) * v
            out[:, :, chunk] = new.to(out.dtype)
        return out
