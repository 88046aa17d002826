"""Guidances that have a name on the command line and in records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from visattn.guidance.edits.block_edits import BlockEdit, SkipBlock
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.enhance_a_video import EnhanceVideo
from visattn.guidance.edits.pladis import PLADIS
from visattn.guidance.edits.steer import steer
from visattn.guidance.guiders.guidance import (
    PAG,
    SEG,
    SLG,
    STG,
    CFGZeroStar,
    S2Guidance,
    SoftPAG,
    TemperatureGuidance,
    TokenPerturbation,
)
from visattn.guidance.guiders.guide import guide
from visattn.guidance.guiders.nag import NAG
from visattn.guidance.parameter_kinds import (
    BLOCKS,
    BOUND,
    COUNT,
    HEADS,
    LAYERS,
    NUMBER,
    TEXT,
    Kind,
    word,
)

__all__ = ["GUIDANCES", "Named", "guided"]

WINDOW = {"start": BOUND, "stop": BOUND}
SCALED = {"scale": NUMBER, **WINDOW}
POLICY = word("all", "image_rows", "ii_identity", "ii_renorm")


@dataclass(frozen=True)
class Named:
    """A guidance by name.

    Args:
        make: its class, a guidance for ``guide`` or an edit for ``steer``.
        summary: a line of what it does; example: in written form.
        parameters: of the class, that can be written, with their kinds.
        needed: those that must be there.
        fixed: arguments that the name stands for.
    """

    make: Any
    summary: str
    example: str
    parameters: Mapping[str, Kind]
    needed: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def is_of(self, value: Any) -> bool:
        """Whether a guidance has this name, and nothing that cannot be written."""
        if type(value) is not self.make:
            return False
        usual = {own.name: own.default for own in fields(self.make)} | dict(self.fixed)
        others = [name for name in usual if name not in self.parameters]
        return all(getattr(value, name) == usual[name] for name in others)


GUIDANCES: dict[str, Named] = {
    "softpag": Named(
        SoftPAG,
        "heads moved towards the identity in a further pass, as search-heads finds them",
        "softpag:heads=3:2,5;7:1,strength=0.5,scale=3",
        {
            "heads": HEADS,
            "strength": NUMBER,
            "policy": POLICY,
            "target": word("value", "uniform", "mean_query"),
            **SCALED,
        },
    ),
    "pag": Named(
        PAG,
        "identity attention of whole layers in a further pass",
        "pag:layers=3,scale=3",
        {"layers": LAYERS, "policy": POLICY, **SCALED},
    ),
    "seg": Named(
        SEG,
        "blurred queries in a further pass",
        "seg:layers=3,sigma=2,scale=3",
        {"layers": LAYERS, "sigma": NUMBER, **SCALED},
    ),
    "slg": Named(
        SLG,
        "blocks skipped in a further pass",
        "slg:blocks=7,8,9,scale=2.8,start=0.01,stop=0.2",
        {"blocks": BLOCKS, **SCALED},
    ),
    "slg-uncond": Named(
        SkipBlock,
        "blocks skipped in the unconditional pass, without a further one",
        "slg-uncond:blocks=10,start=0.2",
        {"blocks": BLOCKS, **WINDOW},
        needed=("blocks",),
        fixed={"passes": ("uncond",), "what": "block"},
    ),
    "stg": Named(
        STG,
        "blocks, or their attention, skipped in a further pass",
        "stg:blocks=11,scale=1",
        {"blocks": BLOCKS, "what": word("attention", "block"), **SCALED},
    ),
    "temperature": Named(
        TemperatureGuidance,
        "flatter attention in a further pass",
        "temperature:layers=3,temperature=2,scale=3",
        {"layers": LAYERS, "temperature": NUMBER, **SCALED},
    ),
    "tpg": Named(
        TokenPerturbation,
        "tokens in another order in a further pass",
        "tpg:blocks=0,1,share=0.5,scale=3",
        {"blocks": BLOCKS, "share": NUMBER, "seed": COUNT, **SCALED},
    ),
    "s2": Named(
        S2Guidance,
        "random blocks left out in a further pass",
        "s2:share=0.1,scale=1",
        {"share": NUMBER, "seed": COUNT, **SCALED},
    ),
    "cfg-zero-star": Named(
        CFGZeroStar,
        "classifier-free guidance with a scaled unconditional prediction",
        "cfg-zero-star:zero_init=1",
        {"zero_init": BOUND},
    ),
    "nag": Named(
        NAG,
        "attention away from that to a negative text, without a further pass",
        "nag:negative_prompt=blurry, distorted,scale=11,tau=2.5,alpha=0.25",
        {
            "negative_prompt": TEXT,
            "tau": NUMBER,
            "alpha": NUMBER,
            "norm": word("l1", "l2"),
            "formulation": word("extrapolate", "official"),
            **SCALED,
        },
        needed=("negative_prompt",),
    ),
    "enhance-a-video": Named(
        EnhanceVideo,
        "attention counts for more where frames attend to each other, without a further pass",
        "enhance-a-video:weight=4",
        {"weight": NUMBER, "layers": LAYERS, **WINDOW},
    ),
    "pladis": Named(
        PLADIS,
        "sparser cross-attention, extrapolated, without a further pass",
        "pladis:weight=2,rule=entmax15",
        {"weight": NUMBER, "rule": word("entmax15", "sparsemax"), "layers": LAYERS, **WINDOW},
    ),
}


@contextmanager
def guided(pipe: Any, guidances: Sequence[Any]) -> Iterator[None]:
    """A pipeline with several guidances inside a ``with`` block: edits by ``steer``, the others by
    ``guide``. Errors as theirs."""
    edits = [own for own in guidances if isinstance(own, (Edit, BlockEdit))]
    others = [own for own in guidances if not isinstance(own, (Edit, BlockEdit))]
    with ExitStack() as stack:
        if edits:
            stack.enter_context(steer(pipe, edits))
        if others:
            stack.enter_context(guide(pipe, others))
        yield
