"""Attention-steering guidance: edits of attention calls and blocks, guidance by a perturbed pass,
and the search for the heads that it needs."""

from typing import Any

from visattn.guidance.attention_losses import astar_retention, astar_segregation, attend_and_excite
from visattn.guidance.blocks import BlockEdit, ShuffleTokens, SkipBlock, SkipRandomBlocks
from visattn.guidance.columns import ScaleHeads, ScaleTokens
from visattn.guidance.compose import ComposeObject, prime_composer, region_constrained
from visattn.guidance.detector import DetectorGuidance
from visattn.guidance.edit import Edit
from visattn.guidance.enhance import EnhanceVideo
from visattn.guidance.guidances import (
    PAG,
    SEG,
    SLG,
    STG,
    CFGZeroStar,
    Guidance,
    S2Guidance,
    SoftPAG,
    TemperatureGuidance,
    TokenPerturbation,
)
from visattn.guidance.guide import guide
from visattn.guidance.head_search import search_heads
from visattn.guidance.heads import HeadSet
from visattn.guidance.latent_update import AStar, AttendAndExcite, LatentUpdate
from visattn.guidance.motion import ReplaceMap, replace_motion
from visattn.guidance.nag import NAG
from visattn.guidance.named import GUIDANCES, guided
from visattn.guidance.objectives import caption_score
from visattn.guidance.perturb import Perturb
from visattn.guidance.pladis import PLADIS
from visattn.guidance.prompt_tokens import phrase_tokens, real_tokens
from visattn.guidance.proportional import ProportionalAttention
from visattn.guidance.queries import BlurQueries, ReplaceQueries, Temperature
from visattn.guidance.readout import Reading, ReadTokens
from visattn.guidance.regional import regional
from visattn.guidance.regions import LabelBias, RegionMask
from visattn.guidance.sequence import WORD_SWAP, ShareSettings, generate_sequence
from visattn.guidance.sharing import BorrowKeys, ShareKV
from visattn.guidance.sinks import RedistributeSinks
from visattn.guidance.state import State
from visattn.guidance.steering import steer
from visattn.guidance.subject_masks import SubjectMasks
from visattn.guidance.subjects import consistory, ir_diffusion, story_diffusion
from visattn.guidance.text import guidance_text, parse_guidance
from visattn.guidance.token_readout import TokenReadout
from visattn.guidance.update_latents import update_latents

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
    if name in ("PerturbedGuidance", "SoftPerturbedGuidance"):  # which import diffusers
        from visattn.guidance import modular

        return getattr(modular, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
