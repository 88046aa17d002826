"""Block maps of patterns from a process-wide cache; every block-sparse backend reads them."""

from __future__ import annotations

from visattn.attention.spec import AttentionSpec
from visattn.blocks.block_map import BlockMap, PartialPolicy
from visattn.blocks.cache import MapCache
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Pattern

__all__ = ["MAPS", "block_sizes", "head_maps", "lower_cached"]

# The limit includes the maps and everything that is cached with them.
MAPS: MapCache[BlockMap] = MapCache(limit_bytes=1 << 30)


def block_sizes(length: int) -> tuple[int, int]:
    """Return the query and key block of ``blockwise`` for a sequence length."""
    return (64, 64) if length < 16384 else (128, 128)


def lower_cached(
    pattern: Pattern,
    layout: TokenLayout,
    kv_layout: TokenLayout | None,
    block_q: int,
    block_k: int,
    partial: PartialPolicy = "exact",
) -> BlockMap:
    """Return the block map of a pattern from the process-wide cache, so that equal patterns share
    one map.

    Args:
        pattern: a static pattern.
        layout: tokens of the queries.
        kv_layout: tokens of the keys, or None if they are those of ``layout``.
        block_q: queries of a block.
        block_k: keys of a block.
        partial: what happens to partial blocks, see ``build_map``.

    Returns:
        ``pattern.lower(...)``; the same object for equal arguments while it is in the cache.

    Raises:
        ValueError: the pattern does not fit the layout or leaves a query block without keys.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.attention import lower_cached
        >>> from visattn.patterns import Neighborhood
        >>> layout = TokenLayout(Grid(4, 16, 16))
        >>> block_map = lower_cached(Neighborhood((3, 5, 5)), layout, None, 64, 64)
        >>> len(block_map.bounds)  # query blocks
        16
        >>> block_map.block_density < 1
        True
    """
    key = (pattern, layout, kv_layout, block_q, block_k, partial)
    return MAPS.get(
        key,
        lambda: pattern.lower(layout, block_q, block_k, partial=partial, kv_layout=kv_layout),
    )


def head_maps(spec: AttentionSpec, block_q: int, block_k: int) -> list[BlockMap]:
    """Return the block map of each head of a spec; equal patterns share one map."""
    patterns = spec.static_patterns
    maps = {
        pattern: lower_cached(pattern, spec.layout, spec.kv_layout, block_q, block_k)
        for pattern in dict.fromkeys(patterns)
    }
    return [maps[pattern] for pattern in patterns]
