"""The methods of guidance whose docstrings name their source, default and differences."""

from __future__ import annotations

from visattn.guidance.attention_losses import astar_retention, astar_segregation, attend_and_excite
from visattn.guidance.blocks import ShuffleTokens, SkipBlock, SkipRandomBlocks
from visattn.guidance.columns import ScaleHeads, ScaleTokens
from visattn.guidance.compose import ComposeObject, prime_composer, region_constrained
from visattn.guidance.detector import DetectorGuidance
from visattn.guidance.enhance import EnhanceVideo
from visattn.guidance.guidances import (
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
from visattn.guidance.head_search import search_heads
from visattn.guidance.latent_update import AStar, AttendAndExcite
from visattn.guidance.motion import ReplaceMap, replace_motion
from visattn.guidance.nag import NAG
from visattn.guidance.perturb import Perturb
from visattn.guidance.pladis import PLADIS
from visattn.guidance.proportional import ProportionalAttention
from visattn.guidance.queries import BlurQueries, ReplaceQueries, Temperature
from visattn.guidance.regional import regional
from visattn.guidance.regions import LabelBias, RegionMask
from visattn.guidance.sequence import generate_sequence
from visattn.guidance.sharing import BorrowKeys, ShareKV
from visattn.guidance.sinks import RedistributeSinks
from visattn.guidance.subjects import consistory, ir_diffusion, story_diffusion

__all__ = ["EDITS", "METHODS"]

METHODS: tuple[type | object, ...] = (
    PAG,
    SEG,
    SLG,
    STG,
    SoftPAG,
    TemperatureGuidance,
    TokenPerturbation,
    S2Guidance,
    CFGZeroStar,
    NAG,
    EnhanceVideo,
    PLADIS,
    AStar,
    AttendAndExcite,
    DetectorGuidance,
    astar_retention,
    astar_segregation,
    attend_and_excite,
    consistory,
    generate_sequence,
    ir_diffusion,
    prime_composer,
    region_constrained,
    regional,
    replace_motion,
    search_heads,
    story_diffusion,
)
EDITS: tuple[type | object, ...] = (
    BlurQueries,
    BorrowKeys,
    ComposeObject,
    LabelBias,
    Perturb,
    ProportionalAttention,
    RedistributeSinks,
    RegionMask,
    ReplaceMap,
    ReplaceQueries,
    ScaleHeads,
    ScaleTokens,
    ShareKV,
    ShuffleTokens,
    SkipBlock,
    SkipRandomBlocks,
    Temperature,
)
