"""One rule of a plan, and the denoiser that a plan was made for."""

from __future__ import annotations

from dataclasses import dataclass

from visattn._arguments import is_integer
from visattn.patterns import HeadPattern
from visattn.plan.json_format import MAX_PARTS, shown

__all__ = ["ANY", "PASSES", "ROLES", "Denoiser", "Rule", "Table"]

ANY = "any"
PASSES = ("cond", "uncond", "perturbed")
ROLES = ("transformer", "transformer_2", "unet")
# The patterns of the heads of a layer, by (phase, pass); the pass may be "any".
Table = dict[tuple[int, str], tuple[HeadPattern, ...]]


@dataclass(frozen=True)
class Rule:
    """The patterns of some heads; the last rule of a plan that matches a call decides.

    Args:
        patterns: one pattern for all heads, or a tuple with one per head.
        layer: path of the attention module in the denoiser, ``"blocks.3.attn1"``, or ``"any"``.
        role: ``"transformer"``, ``"transformer_2"``, ``"unet"`` or ``"any"``.
        phase: index of a phase of the plan, or None for all phases.
        pass_: ``"cond"``, ``"uncond"``, ``"perturbed"`` or ``"any"``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.

    Example:
        >>> from visattn.patterns import Radial
        >>> from visattn.plan import Rule
        >>> Rule(Radial(), layer="blocks.3.attn1", pass_="uncond").heads
        (Radial(decay=1.0, sink=False, rule='block', block=128),)
    """

    patterns: HeadPattern | tuple[HeadPattern, ...]
    layer: str = ANY
    role: str = ANY
    phase: int | None = None
    pass_: str = ANY

    def __post_init__(self) -> None:
        if not self.heads or not all(isinstance(item, HeadPattern) for item in self.heads):
            raise TypeError(
                f"patterns={shown(self.patterns)} of a rule must be a pattern, or a tuple of one "
                "per head"
            )
        if len(self.heads) > MAX_PARTS:
            raise ValueError(
                f"a rule has patterns for {len(self.heads)} heads; at most {MAX_PARTS} are allowed"
            )
        if not isinstance(self.layer, str) or not self.layer:
            raise TypeError(f"layer={shown(self.layer)} of a rule must be a module path or 'any'")
        if self.role not in (*ROLES, ANY):
            raise ValueError(f"role={shown(self.role)} must be one of {', '.join((*ROLES, ANY))}")
        if self.pass_ not in (*PASSES, ANY):
            raise ValueError(f"pass={shown(self.pass_)} must be one of {', '.join((*PASSES, ANY))}")
        if self.phase is not None and not (is_integer(self.phase) and self.phase >= 0):
            raise ValueError(f"phase={shown(self.phase)} of a rule must be None or at least 0")

    @property
    def heads(self) -> tuple[HeadPattern, ...]:
        """The pattern of all heads as a tuple of one, or the pattern of each head."""
        return self.patterns if isinstance(self.patterns, tuple) else (self.patterns,)


@dataclass(frozen=True)
class Denoiser:
    """The denoiser that a plan was made for.

    Args:
        kind: its class name.
        layers: its number of attention layers.
        heads: the number of heads of each layer.

    Example:
        >>> from visattn.plan import Denoiser
        >>> print(Denoiser("WanTransformer3DModel", layers=30, heads=12))
        WanTransformer3DModel with 30 layers of 12 heads
    """

    kind: str
    layers: int
    heads: int

    def __str__(self) -> str:
        return f"{self.kind} with {self.layers} layers of {self.heads} heads"
