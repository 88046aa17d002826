"""SoftPAG and PAG: a pass whose attention heads are moved towards the identity."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visattn._arguments import check_number, is_integer, is_number
from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.pag import Perturb, Target
from visattn.guidance.edits.state import Stream
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.head_set import HeadSet, Layers, plain_heads
from visattn.plan import Denoiser

__all__ = ["PAG", "Policy", "SoftPAG", "target_and_stream"]

Policy = Literal["all", "image_rows", "ii_identity", "ii_renorm"]
TARGETS: dict[str, Target] = {"value": "value", "uniform": "mean", "mean_query": "mean_query"}


@dataclass(frozen=True, init=False)
class SoftPAG(Guidance):
    """Soft perturbed attention guidance: the further pass moves heads towards the identity by a
    strength ("Where and How to Perturb", Ahn et al. 2025, arXiv 2506.10978).

    If strength, scale, policy or target is None, it is that of the head set; if the head set has
    none either, it is 1, 3, ``all`` or ``value``.

    Args:
        heads: a HeadSet, or its file, folder or hub id; or heads by layer, with strengths as in
            ``{3: {0: 1.0, 5: 0.5}}`` or without as in ``{3: [0, 5]}``; None means all heads.
        strength: factor of the strengths of the heads, from 0 to 1; 1 is PAG.
        scale: ``w`` of ``w (c - p)``.
        policy: which tokens of joint attention: ``all`` (text rows too, as in the paper),
            ``image_rows``, ``ii_identity`` (image rows keep the logits of the text and their own),
            ``ii_renorm`` (they keep the weights of the text).
        target: what heads are moved towards: ``value`` (the identity), ``uniform`` or
            ``mean_query``; the last two with the policies ``all`` and ``image_rows``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``heads`` has another form.
        ValueError: an argument is out of range.
        OSError: there is no such file of heads.

    Example:
        >>> from visattn import SoftPAG, guide
        >>> with guide(pipe, SoftPAG(heads={1: [0]}, strength=0.5, scale=3.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Ahn et al. (2025), "Where and How to Perturb", arXiv
        2506.10978. Code: github.com/cvlab-kaist/HeadHunter (commit 3828d1c).
    Default:
        code. All rows of joint attention are moved, as in the published results.
    Differences:
        - ``scale`` is 3, as in the published results; the command line of the code has 5.
    """

    heads: HeadSet | Mapping[int | str, object] | None = None
    strength: float = 1.0
    policy: Policy = "all"
    target: Literal["value", "uniform", "mean_query"] = "value"
    example: ClassVar[str] = "SoftPAG(heads={3: [2, 5], 7: [1]}, strength=0.5, scale=3.0)"

    def __init__(
        self,
        heads: HeadSet | str | os.PathLike[str] | Mapping[int | str, object] | None = None,
        strength: float | None = None,
        scale: float | None = None,
        *,
        policy: Policy | None = None,
        target: Literal["value", "uniform", "mean_query"] | None = None,
        start: int | float = 0,
        stop: int | float = 1.0,
    ) -> None:
        if isinstance(heads, (str, os.PathLike)):
            heads = HeadSet.from_pretrained(heads)
        head_set = heads if isinstance(heads, HeadSet) else HeadSet({})
        strength = head_set.strength if strength is None else strength
        scale = (3.0 if head_set.scale is None else head_set.scale) if scale is None else scale
        policy = head_set.policy or "all" if policy is None else policy  # type: ignore[assignment]
        target = head_set.target or "value" if target is None else target  # type: ignore[assignment]
        arguments = locals()
        for name in ("heads", "strength", "scale", "policy", "target", "start", "stop"):
            object.__setattr__(self, name, arguments[name])
        if not isinstance(heads, (HeadSet, Mapping, type(None))):
            raise TypeError(
                f"SoftPAG(heads={heads!r}) must be a HeadSet, heads by layer as in {{3: [0, 5]}}, "
                "or None"
            )
        check_number("SoftPAG", "strength", strength, "from 0 to 1", lambda share: 0 <= share <= 1)
        if policy not in ("all", "image_rows", "ii_identity", "ii_renorm"):
            raise ValueError(
                f"SoftPAG(policy={policy!r}) must be all, image_rows, ii_identity or ii_renorm"
            )
        if target not in TARGETS or (policy.startswith("ii") and target != "value"):
            raise ValueError(
                f"SoftPAG(target={target!r}, policy={policy!r}): targets are value, uniform and "
                "mean_query, the last two with the policies all and image_rows"
            )
        self.__post_init__()

    def edits(self) -> list[Edit | BlockEdit]:
        target, stream = target_and_stream(self.policy, self.target)
        return [
            Perturb(layers=layers, heads=heads, target=target, stream=stream)
            for layers, heads in _by_layer(self.heads, self.strength)
        ]

    def fits(self, denoisers: Mapping[str, Denoiser]) -> None:
        if isinstance(self.heads, HeadSet):
            self.heads.fits(denoisers)

    def arguments(self) -> dict[str, Any]:
        heads = self.heads.layers if isinstance(self.heads, HeadSet) else self.heads
        plain = None if heads is None else {k: plain_heads(v) for k, v in heads.items()}
        return super().arguments() | ({} if plain is None else {"heads": plain})


def target_and_stream(policy: str, target: str) -> tuple[Target, Stream]:
    """Return the target and the stream of ``Perturb`` for a policy and target of SoftPAG.

    Args:
        policy: of SoftPAG.
        target: of SoftPAG.
    """
    by_policy: dict[str, Target] = {"ii_identity": "self_and_text", "ii_renorm": "self_for_image"}
    return by_policy.get(policy, TARGETS[target]), "all" if policy == "all" else "image"


def _by_layer(
    heads: HeadSet | Mapping[int | str, object] | None, strength: float
) -> list[tuple[Layers, dict[int, float] | float]]:
    """Return the strengths of heads, layer by layer."""
    if heads is None:
        return [(None, float(strength))]
    layers: Mapping[Any, Any] = heads.layers if isinstance(heads, HeadSet) else heads
    strengths: list[tuple[Layers, dict[int, float] | float]] = []
    for layer, chosen in layers.items():
        if chosen is None:
            strengths.append(([layer], float(strength)))
            continue
        if not isinstance(chosen, (int, Mapping, Sequence)) or isinstance(chosen, (str, bool)):
            raise TypeError(f"heads has {chosen!r} for layer {layer!r}; give numbers of heads")
        if not isinstance(chosen, Mapping):
            chosen = dict.fromkeys([chosen] if isinstance(chosen, int) else chosen, 1.0)
        for head, share in chosen.items():
            if not is_integer(head) or head < 0:
                raise ValueError(f"heads has {head!r} in layer {layer!r}; heads count from 0")
            if not is_number(share) or not 0 <= share <= 1:
                raise ValueError(
                    f"heads has the strength {share!r} in layer {layer!r}; it must be from 0 to 1"
                )
        strengths.append(([layer], {head: strength * share for head, share in chosen.items()}))
    if not strengths:
        raise ValueError("heads names no head; use None for all heads")
    return strengths


@dataclass(frozen=True, kw_only=True)
class PAG(Guidance):
    """Perturbed attention guidance: the further pass has the identity as the attention of whole
    layers (Ahn et al. 2024, arXiv 2403.17377).

    Args:
        layers: numbers or module paths of attention layers; None means all.
        policy: which tokens of joint attention, as of SoftPAG.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``layers`` has another form.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import PAG, guide
        >>> with guide(pipe, PAG(layers=[1], scale=3.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Ahn et al. (2024), "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
        arXiv 2403.17377. Code: github.com/huggingface/diffusers (commit ff0f7af), the attention
        processor of its pipeline for Stable Diffusion 3.
    Default:
        code. It is the only published form for joint attention; without text tokens it is the
        paper's identity.
    Differences:
        - By default all layers are perturbed; published settings name one or a few.
    """

    layers: Layers = None
    policy: Policy = "ii_identity"
    example: ClassVar[str] = "PAG(layers=[3], scale=3.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        layers = [self.layers] if isinstance(self.layers, (int, str)) else self.layers
        if not isinstance(layers, (Sequence, type(None))):
            raise TypeError(
                f"PAG(layers={self.layers!r}) must be numbers or paths of layers, or None"
            )
        heads = None if layers is None else dict.fromkeys(layers)
        return SoftPAG(heads, policy=self.policy).edits()
