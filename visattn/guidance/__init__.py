"""Edits of attention, guidances, and the search for the heads to perturb.

``edits`` has the edits of attention calls and blocks (``steer``), ``guiders`` the guidances such as
PAG and NAG (``guide``), ``composition`` prompts of regions and sequences, ``token_maps`` the
readout of text tokens, ``head_search`` the search.
"""

from typing import Any

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
from visattn.guidance.composition.shared_segments import WORD_SWAP, ShareSettings
from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
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
from visattn.guidance.edits.read_tokens import Reading, ReadTokens
from visattn.guidance.edits.replace_map import ReplaceMap, replace_motion
from visattn.guidance.edits.share_keys import BorrowKeys, ShareKV
from visattn.guidance.edits.shuffle_tokens import ShuffleTokens
from visattn.guidance.edits.sinks import RedistributeSinks
from visattn.guidance.edits.skip_block import SkipBlock, SkipRandomBlocks
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import steer
from visattn.guidance.guiders.cfg_zero_star import CFGZeroStar
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.guiders.guide import guide
from visattn.guidance.guiders.nag import NAG
from visattn.guidance.guiders.seg import SEG
from visattn.guidance.guiders.skip_blocks import SLG, STG, S2Guidance
from visattn.guidance.guiders.soft_pag import PAG, SoftPAG
from visattn.guidance.guiders.temperature_guidance import TemperatureGuidance
from visattn.guidance.guiders.token_perturbation import TokenPerturbation
from visattn.guidance.head_search.driver import search_heads
from visattn.guidance.head_search.objectives import caption_score
from visattn.guidance.head_set import HeadSet
from visattn.guidance.registry import GUIDANCES, guided, parse_guidance
from visattn.guidance.token_maps.detector import DetectorGuidance
from visattn.guidance.token_maps.latent_update import AStar, AttendAndExcite, LatentUpdate
from visattn.guidance.token_maps.losses import astar_retention, astar_segregation, attend_and_excite
from visattn.guidance.token_maps.prompt_tokens import phrase_tokens, real_tokens
from visattn.guidance.token_maps.subject_masks import SubjectMasks
from visattn.guidance.token_maps.token_readout import TokenReadout
from visattn.guidance.token_maps.update_latents import update_latents
from visattn.guidance.written_form import guidance_text

__all__ = [
    "GUIDANCES",
    "NAG",
    "PAG",
    "PLADIS",
    "SEG",
    "SLG",
    "STG",
    "WORD_SWAP",
    "AStar",
    "AttendAndExcite",
    "BlockEdit",
    "BlurQueries",
    "BorrowKeys",
    "CFGZeroStar",
    "ComposeObject",
    "DetectorGuidance",
    "Edit",
    "EnhanceVideo",
    "Guidance",
    "HeadSet",
    "LabelBias",
    "LatentUpdate",
    "Perturb",
    "ProportionalAttention",
    "ReadTokens",
    "Reading",
    "RedistributeSinks",
    "RegionMask",
    "ReplaceMap",
    "ReplaceQueries",
    "S2Guidance",
    "ScaleHeads",
    "ScaleTokens",
    "ShareKV",
    "ShareSettings",
    "ShuffleTokens",
    "SkipBlock",
    "SkipRandomBlocks",
    "SoftPAG",
    "SoftPerturbedGuidance",
    "State",
    "SubjectMasks",
    "Temperature",
    "TemperatureGuidance",
    "TokenPerturbation",
    "TokenReadout",
    "astar_retention",
    "astar_segregation",
    "attend_and_excite",
    "caption_score",
    "consistory",
    "generate_sequence",
    "guidance_text",
    "guide",
    "guided",
    "ir_diffusion",
    "parse_guidance",
    "phrase_tokens",
    "prime_composer",
    "real_tokens",
    "region_constrained",
    "regional",
    "replace_motion",
    "search_heads",
    "steer",
    "story_diffusion",
    "update_latents",
]


def __getattr__(name: str) -> Any:
    if name in ("PerturbedGuidance", "SoftPerturbedGuidance"):  # their module imports diffusers
        from visattn.guidance import modular

        return getattr(modular, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
