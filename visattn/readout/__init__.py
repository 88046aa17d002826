"""Attention read out of running pipelines: sampled rows, measures of heads, pictures of them."""

from visattn.readout.head_readout import HeadReadout, Key, Shares
from visattn.readout.measures import Measures, Tally
from visattn.readout.sampled_rows import RowChunk, RowSample, TileSample, attention_rows, draw_rows
from visattn.readout.sampler import ANY_PASS, Sampler
from visattn.readout.tiles import Tiling, default_tilings

__all__ = [
    "ANY_PASS",
    "HeadReadout",
    "Key",
    "Measures",
    "RowChunk",
    "RowSample",
    "Sampler",
    "Shares",
    "Tally",
    "TileSample",
    "Tiling",
    "attention_rows",
    "default_tilings",
    "draw_rows",
]
