"""What a sampler reports: a layer in one pass, and the shares of one head."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

__all__ = ["HeadReadout", "Key", "Shares"]


class Key(NamedTuple):
    """An attention layer in one pass; ``number`` counts the layers of its denoiser.

    Example:
        >>> from visattn.readout import Key
        >>> Key("transformer", 0, "blocks.0.attn1", "cond").number
        0
    """

    role: str
    number: int
    layer: str
    pass_: str


@dataclass(frozen=True)
class Shares:
    """The measures of one head, each a share; ``visattn.readout.measures`` defines them.

    Args:
        frame: share of the mass in the query's own frame.
        same_place: share of the mass at the same place in other frames.
        window: share of the mass in the window around the query.
        columns: share of the mass in the column keys, or None where it is not defined.
        text: share of the mass in text keys.
        tile_share: smallest share of the key tiles that holds 90 % of the mass, over all tilings.
        tiling: the name of the tiling with this share.
        tile_shares: the share of every tiling, by name.

    Example:
        >>> from visattn.readout import Shares
        >>> shares = Shares(0.5, 0.1, 0.4, None, 0.1, 0.2, "1x8x8", {"1x8x8": 0.2})
        >>> shares.numbers()["tile_share"]
        0.2
    """

    frame: float
    same_place: float
    window: float
    columns: float | None
    text: float
    tile_share: float
    tiling: str
    tile_shares: dict[str, float]

    def numbers(self) -> dict[str, Any]:
        """The measures as JSON values, rounded to six places."""
        shares = {name: round(value, 6) for name, value in self.tile_shares.items()}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        return rounded | {"tile_shares": shares}


@dataclass(frozen=True)
class HeadReadout:
    """The measures of a head, as means over calls.

    Args:
        role: the denoiser, such as ``"transformer"``.
        layer: path of the layer in the denoiser.
        number: number of the layer.
        head: number of the head.
        pass_: ``"cond"``, ``"uncond"`` or ``ANY_PASS``.
        step: the denoising step; None for the mean over all steps that were read.
        calls: number of calls that were read; each item of a batch is one.
        shares: the measures.

    Example:
        >>> from visattn.readout import HeadReadout, Shares
        >>> shares = Shares(0.5, 0.1, 0.4, None, 0.1, 0.2, "1x8x8", {"1x8x8": 0.2})
        >>> head = HeadReadout("transformer", "blocks.0.attn1", 0, 3, "cond", None, 1, shares)
        >>> head.numbers()["head"]
        3
    """

    role: str
    layer: str
    number: int
    head: int
    pass_: str
    step: int | None
    calls: int
    shares: Shares

    def numbers(self) -> dict[str, Any]:
        """The measures as JSON values, rounded to six places."""
        names = ("role", "layer", "number", "head", "step", "calls")
        values = {name: getattr(self, name) for name in names}
        return values | {"pass": self.pass_} | self.shares.numbers()
