"""The methods of guidance whose docstrings name their source, default and differences."""

from __future__ import annotations

from visattn.guidance.composition.consistent_subjects import (
    consistory,
    ir_diffusion,
    story_diffusion,
)
from visattn.guidance.composition.ditctrl import generate_sequence
from visattn.guidance.composition.prime_composer import (
    ComposeObject,
    prime_composer,
    region_constrained,
)
from visattn.guidance.composition.regional import regional
from visattn.guidance.edits.enhance_a_video import EnhanceVideo
from visattn.guidance.edits.key_weights import ScaleHeads, ScaleTokens
from visattn.guidance.edits.label_bias import LabelBias, RegionMask
from visattn.guidance.edits.pag import Perturb
from visattn.guidance.edits.pladis import PLADIS
from visattn.guidance.edits.query_edits import (
    BlurQueries,
    ProportionalAttention,
    ReplaceQueries,
    Temperature,
)
from visattn.guidance.edits.replace_map import ReplaceMap, replace_motion
from visattn.guidance.edits.share_keys import BorrowKeys, ShareKV
from visattn.guidance.edits.shuffle_tokens import ShuffleTokens
from visattn.guidance.edits.sinks import RedistributeSinks
from visattn.guidance.edits.skip_block import SkipBlock, SkipRandomBlocks
from visattn.guidance.guiders.cfg_zero_star import CFGZeroStar
from visattn.guidance.guiders.nag import NAG
from visattn.guidance.guiders.seg import SEG
from visattn.guidance.guiders.skip_blocks import SLG, STG, S2Guidance
from visattn.guidance.guiders.soft_pag import PAG, SoftPAG
from visattn.guidance.guiders.temperature_guidance import TemperatureGuidance
from visattn.guidance.guiders.token_perturbation import TokenPerturbation
from visattn.guidance.head_search.driver import search_heads
from visattn.guidance.token_maps.detector import DetectorGuidance
from visattn.guidance.token_maps.latent_update import AStar, AttendAndExcite
from visattn.guidance.token_maps.losses import astar_retention, astar_segregation, attend_and_excite

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
