"""Attention of q, k, v by a pattern per head."""

from visattn.attention.choice import BACKENDS, Backend, BackendUnavailable, choose_backend
from visattn.attention.lowering import lower_cached
from visattn.attention.operator import attention_by, merge_attention, sparse_attention
from visattn.attention.spec import AttentionSpec, Choice

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Backend",
    "BackendUnavailable",
    "Choice",
    "attention_by",
    "choose_backend",
    "lower_cached",
    "merge_attention",
    "sparse_attention",
]
