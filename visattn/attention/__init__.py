"""Attention of q, k, v by a pattern per head."""

from visattn.attention.operator import (
    BACKENDS,
    Backend,
    BackendUnavailable,
    Choice,
    attention_by,
    choose_backend,
    lower_cached,
    merge_attention,
    sparse_attention,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailable",
    "Choice",
    "attention_by",
    "choose_backend",
    "lower_cached",
    "merge_attention",
    "sparse_attention",
]
