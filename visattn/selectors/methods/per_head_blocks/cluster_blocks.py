"""Queries and keys clustered by similarity, and key clusters chosen for each query cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_count, check_keep, check_share, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.per_head_order import (
    PerHeadSelector,
    Runs,
    grid_rows,
    grid_tokens,
    uneven_runs,
)
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import top_count, top_mass

__all__ = ["ClusterBlocks", "kmeans"]

CHUNK = 1 << 24  # most distances of one matrix product


@dataclass(frozen=True, eq=False)
class ClusterBlocks(PerHeadSelector):
    """k-means clusters of keys, chosen for each cluster of queries up to a share of the mass.

    Queries and keys are clustered separately for each head. The mass of a key cluster of n keys at
    a query cluster is ``n e^(c_q . c_k / sqrt(d))``.

    With ``metric="interaction"`` two keys are near if they give similar logits with the queries,
    and two queries if they give similar logits with the keys (iCATS): k-means of ``x M^(1/2)``,
    where M is the second moment of the other side.

    Args:
        mass: the share of the mass.
        least: least number of clusters of a row, or the share of all clusters, rounded down.
        q_clusters: clusters of queries; at most one for each token.
        k_clusters: clusters of keys; at most one for each token.
        iterations: iterations of Lloyd's algorithm at the first step of a generation.
        block: most tokens of a block; larger clusters are cut into several blocks.
        metric: ``"euclid"`` or ``"interaction"``.
        warm: iterations at later steps, which start from the cluster means of the previous step.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import ClusterBlocks
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> clusters = ClusterBlocks(0.9, q_clusters=4, k_clusters=8, block=16)
        >>> sparse_attention(q, k, v, clusters, layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Yang et al. (2025), "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via
        Semantic-Aware Permutation", NeurIPS 2025, arXiv 2505.18875. Code:
        github.com/svg-project/Sparse-VideoGen (commit 5ce7b01).
    Default:
        code
    Differences:
        - Centres begin at evenly spread tokens; theirs at drawn ones.
        - 8 iterations at the first step; their scripts make up to 50, and stop where the centres
          hardly move.
        - Long clusters are cut into blocks that are kept or left together.
    """

    mass: float = 0.9
    least: int | float = 0.1
    q_clusters: int = 300
    k_clusters: int = 1000
    iterations: int = 8
    block: int = 64
    metric: str = "euclid"
    warm: int = 2
    name: ClassVar[str] = "cluster_blocks"
    color: ClassVar[str] = "#4fb897"
    example: ClassVar[str] = "cluster_blocks(0.5, 1, 5, 7, 3, 8)"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_keep("least", self.least)
        for name in ("q_clusters", "k_clusters", "iterations", "warm"):
            check_count(name, getattr(self, name), 1)
        check_block("block", self.block)
        check_word("metric", self.metric, ("euclid", "interaction"))

    def arrange(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        past: SelectorState,
    ) -> tuple[torch.Tensor, Runs, int, torch.Tensor, Runs, int]:
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = grid_tokens(q, layout).to(acc_dtype), grid_tokens(k, layout).to(acc_dtype)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        sides, centres = [], []
        for place, (x, other, clusters) in enumerate(
            ((queries, keys, self.q_clusters), (keys, queries, self.k_clusters))
        ):
            seen = _role(x, other) if self.metric == "interaction" else x
            first = None if past.centres is None else past.centres[place]
            if first is not None and first.shape[3] != x.shape[3]:
                first = None  # an edit has changed the size of the heads
            iterations = self.iterations if first is None else self.warm
            owner, means = kmeans(seen, min(clusters, x.shape[2]), iterations, first)
            centres.append(means)
            count = owner.new_zeros(*owner.shape[:2], min(clusters, x.shape[2]))
            count.scatter_add_(2, owner, torch.ones_like(owner))
            sides.append((owner.argsort(dim=-1, stable=True), count))
        past.centres = (centres[0], centres[1])
        (q_order, q_count), (k_order, k_count) = sides
        q_runs = uneven_runs(q_count, q_order.shape[2], self.block)
        k_runs = uneven_runs(k_count, k_order.shape[2], self.block)
        return q_order, q_runs, self.block, k_order, k_runs, self.block

    def choose(self, inputs: Inputs, q_runs: Runs, k_runs: Runs) -> torch.Tensor:
        q_rows = grid_rows(inputs.layout, inputs.q_side, q_runs)
        k_rows = grid_rows(inputs.layout, inputs.k_side, k_runs)
        q_mean, _ = _group_means(inputs.q_mean[:, :, q_rows], q_runs)
        k_mean, k_count = _group_means(inputs.k_mean[:, :, k_rows], k_runs)
        scores = q_mean @ k_mean.mT * inputs.scale + k_count.clamp(min=1).log()[..., None, :]
        scores = scores.float().masked_fill((k_count == 0)[..., None, :], -torch.inf)
        least = self.least
        if isinstance(least, float):
            least = max(1, int(least * min(self.k_clusters, inputs.layout.grids[0][1].numel)))
        kept = top_mass(scores, self.mass) | top_count(scores, least)
        rows = kept.gather(2, q_runs.group[..., None].expand(-1, -1, -1, kept.shape[3]))
        columns = k_runs.group[:, :, None].expand(-1, -1, rows.shape[2], -1)
        return rows.gather(3, columns)


def _group_means(means: torch.Tensor, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of clusters, ``[B, H, C, D]``, and their sizes, from the means of blocks."""
    groups = runs.group.shape[2]  # at least as many as there are clusters
    total = means.new_zeros(*means.shape[:2], groups, means.shape[3])
    index = runs.group[..., None].expand(-1, -1, -1, means.shape[3])
    total.scatter_add_(2, index, means * runs.length[..., None])
    count = torch.zeros_like(runs.group).scatter_add_(2, runs.group, runs.length)
    return total / count.clamp(min=1)[..., None], count


def _role(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``x M^(1/2)``, with ``M`` the second moment of ``other``.

    Distances between the results are root mean square differences of logits.
    """
    moment = other.mT @ other / other.shape[2]
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return x @ root


def kmeans(
    x: torch.Tensor, clusters: int, iterations: int, first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster points by Lloyd's algorithm.

    Ties go to the lower cluster number; an empty cluster keeps its centre.

    Args:
        x: points ``[B, H, n, D]``.
        clusters: number of clusters.
        iterations: number of iterations, at least 1.
        first: initial centres; default: evenly spread points.

    Returns:
        The cluster of each point, int64 ``[B, H, n]``, and the means of the clusters,
        ``[B, H, clusters, D]``.
    """
    count = x.shape[2]
    spread = torch.arange(clusters, device=x.device) * count // clusters
    centres = x[:, :, spread] if first is None else first
    for _ in range(iterations):
        owner = _nearest(x, centres)
        total = torch.zeros_like(centres)
        total.scatter_add_(2, owner[..., None].expand_as(x), x)
        number = x.new_zeros(centres.shape[:3]).scatter_add_(2, owner, torch.ones_like(x[..., 0]))
        mean = total / number.clamp(min=1)[..., None]
        centres = torch.where((number > 0)[..., None], mean, centres)
    return owner, centres


def _nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the number of the nearest centre of each point."""
    half = centres.square().sum(-1)[..., None, :] / 2
    step = max(1, CHUNK // (x.shape[0] * x.shape[1] * centres.shape[2]))
    parts = [
        (half - x[:, :, begin : begin + step] @ centres.mT).argmin(-1)
        for begin in range(0, x.shape[2], step)
    ]
    return torch.cat(parts, 2)
