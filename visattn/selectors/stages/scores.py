"""The score stage: the importance of each key block to each query block.

A score takes the Inputs of a call and returns float32 ``[B, H, Nq, Nk]``: logarithms of masses, up
to a constant of each row. The caller then sets pairs that cannot be chosen to minus infinity. Each
score is a frozen dataclass, so that it can be printed, compared and cached.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn.geometry.layout import index_on
from visattn.selectors.stages.blocks import block_parts
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.kernels import unit_stride

__all__ = [
    "Antidiagonal",
    "Bounds",
    "ExactMass",
    "Gate",
    "Pooled",
    "Representative",
    "Sampled",
    "Score",
    "SubTiles",
    "register_gate",
    "row_parts",
]

MOST_EXPONENT = 60.0
CHUNK = 1 << 22  # most elements of a temporary tensor, unless a single row is larger

# registered gates by name
_GATES: dict[str, Callable[[Inputs], torch.Tensor]] = {}


class Score(ABC):
    """Base class of the scores.

    Attributes:
        row_independent: whether the scores of a query block depend on no other query block.
    """

    row_independent: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return scores ``[B, H, Nq, Nk]``."""


def row_parts(count: int, elements: int) -> Iterator[slice]:
    """Cut ``count`` rows of ``elements`` each into parts of at most CHUNK elements or one row."""
    step = max(1, CHUNK // max(1, elements))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


@dataclass(frozen=True)
class Pooled(Score):
    """Mean query times mean key.

    Args:
        scaled: multiply by the scale of the logits, so that a softmax over the scores approximates
            attention.
        log_size: add the logarithm of the block's length, because n equal keys have n times the
            mass of one key.
    """

    scaled: bool = True
    log_size: bool = True

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        length = inputs.k_side.length
        bias = length.clamp(min=1).log() if self.log_size else torch.zeros_like(length).float()
        factor = inputs.scale if self.scaled else 1.0
        if inputs.kernels:
            return _pooled_by_kernels(inputs, factor, bias)
        out = inputs.q_mean @ inputs.k_mean.mT * factor + bias[..., None, :]
        return out.float()


def _pooled_by_kernels(inputs: Inputs, factor: float, bias: torch.Tensor) -> torch.Tensor:
    """Return pooled scores ``[B, H, Nq, Nk]`` by two kernel launches.

    Pairs that cannot be chosen have minus infinity.
    """
    from visattn.kernels.pooled import pooled_scores

    q_side, k_side = inputs.q_side, inputs.k_side
    return pooled_scores(
        unit_stride(inputs.q),
        inputs.own_k_mean,
        bias.float().contiguous(),
        q_side.tokens32,
        q_side.length32,
        q_side.some,
        k_side.some,
        factor,
    )


@dataclass(frozen=True)
class Bounds(Score):
    """Upper bound of the logit between the mean query and any key of the block.

    ``relu(q) . max k - relu(-q) . min k`` with the componentwise bounds of the keys (Tang et al.
    2024, Quest, arXiv 2406.10774).
    """

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        blocks, gone = inputs.k_blocks, ~inputs.k_side.exists[..., None]
        high = inputs.for_heads(blocks.masked_fill(gone, -torch.inf).amax(-2)).to(inputs.q_mean)
        low = inputs.for_heads(blocks.masked_fill(gone, torch.inf).amin(-2)).to(inputs.q_mean)
        empty = (inputs.k_side.length == 0)[..., None]
        high, low = high.masked_fill(empty, 0), low.masked_fill(empty, 0)
        mean = inputs.q_mean
        return ((mean.relu() @ high.mT - (-mean).relu() @ low.mT) * inputs.scale).float()


@dataclass(frozen=True)
class SubTiles(Score):
    """Mass of a softmax among short runs of tokens (the hierarchical score of DFSAttn, ICML 2026).

    Each block is cut into runs of ``size`` tokens. The mean query of each run attends to the mean
    keys of all runs. The score of a block sums the mass that it gets from all runs of the query
    block.

    Args:
        size: tokens of a run.
        log_size: as in Pooled.
    """

    size: int = 16
    log_size: bool = True

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        q, q_count = block_parts(inputs.q_blocks, inputs.q_side.exists, self.size)
        k, k_count = block_parts(inputs.k_blocks, inputs.k_side.exists, self.size)
        k = inputs.for_heads(k)
        batch, heads, num_k, parts = k.shape[:4]
        bias = k_count.clamp(min=1).log() if self.log_size else torch.zeros_like(k_count).float()
        chosen = inputs.k_side.grid[:, None] & (k_count > 0)
        bias = bias.masked_fill(~chosen, -torch.inf).flatten(-2)[..., None, None, :]
        flat = k.flatten(2, 3).mT[:, :, None]  # [B, H, 1, D, Nk * parts]
        out = []
        for rows in row_parts(q.shape[2], batch * heads * parts * num_k * q.shape[3]):
            # [B, H, r, query parts, Nk * parts]
            logits = q[:, :, rows] @ flat * inputs.scale + bias
            mass = logits.softmax(-1).unflatten(-1, (num_k, parts)).sum(-1)
            exists = (q_count[..., rows, :] > 0)[..., None]
            out.append((mass * exists).sum(-2).log())
        return torch.cat(out, 2).float()


@dataclass(frozen=True)
class Representative(Score):
    """Logarithm of the mass that the mean query gives to the keys of each block.

    It has the best recall of the cheap scores, at 1 / block_q of the products of dense attention.
    """

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        k = inputs.for_heads(inputs.k_blocks).to(inputs.q_mean)
        batch, heads, num_k, size = k.shape[:4]
        flat = k.flatten(2, 3).mT
        gone = ~inputs.k_side.exists.flatten(-2)[..., None, :]
        out = []
        for rows in row_parts(inputs.q_mean.shape[2], batch * heads * num_k * size):
            logits = inputs.q_mean[:, :, rows] @ flat * inputs.scale
            logits = logits.masked_fill(gone, -torch.inf).unflatten(-1, (num_k, size))
            out.append(logits.logsumexp(-1))
        return torch.cat(out, 2).float()


@dataclass(frozen=True)
class ExactMass(Score):
    """The exact attention mass that the queries of a block give to each block of the grid.

    It costs half of dense attention, and serves as the reference for other scores (Xia et al. 2025,
    AdaSpa, arXiv 2502.21079: measured block mass).

    With the LSE of the last step (over the keys that were seen then, text included) masses are
    ``exp(logit - LSE)`` directly, without a softmax over all logits of a row.
    """

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        k = inputs.for_heads(inputs.k_blocks).to(inputs.q_mean)
        batch, heads, num_k, size = k.shape[:4]
        flat = k.flatten(2, 3).mT[:, :, None]
        chosen = inputs.k_side.exists & inputs.k_side.grid[:, None]
        gone = ~chosen.flatten(-2)[..., None, None, :]
        out = []
        per_row = batch * heads * num_k * size * inputs.q_side.size
        lse = None
        if inputs.lse is not None:
            lse = inputs.q_side.take(inputs.lse[..., None]).to(inputs.q_mean)
        for rows in row_parts(inputs.q_mean.shape[2], per_row):
            q = inputs.q_blocks[:, :, rows].to(inputs.q_mean)
            logits = (q @ flat * inputs.scale).masked_fill(gone, -torch.inf)
            if lse is None:
                mass = logits.softmax(-1)
            else:
                # after a sparse call the LSE may be far below that of all keys
                mass = (logits - lse[:, :, rows]).clamp(max=MOST_EXPONENT).exp()
            mass = mass.unflatten(-1, (num_k, size)).sum(-1)
            exists = inputs.q_side.exists[..., rows, :, None]
            out.append((mass * exists).sum(-2).log())
        return torch.cat(out, 2).float()


@dataclass(frozen=True)
class Sampled(Score):
    """Attention between a few sampled tokens of each block, at the same places in all blocks.

    Args:
        q_tokens: sampled queries of a block.
        k_tokens: sampled keys of a block.
        reduce: ``"softmax"``: the largest probability in the block, with a softmax of each sampled
            query over all sampled keys (Gu et al. 2025, adaptive block-sparse attention of BLADE,
            arXiv 2508.10774). ``"max"``: the largest ratio of exp(logit) to the largest exp(logit)
            of the query (Li et al. 2025, pyramid sparse attention, arXiv 2512.04025).
        seed: seed of the places.
    """

    q_tokens: int = 16
    k_tokens: int = 16
    reduce: Literal["softmax", "max"] = "softmax"
    seed: int = 0

    def places(self, size: int, count: int, salt: int) -> list[int]:
        """Return the sampled places within a block, ascending."""
        generator = torch.Generator().manual_seed(self.seed * 2 + salt)
        chosen = torch.randperm(size, generator=generator, device="cpu")[: min(count, size)]
        return sorted(chosen.tolist())

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        q_places = self.places(inputs.q_side.size, self.q_tokens, 0)
        k_places = self.places(inputs.k_side.size, self.k_tokens, 1)
        # places beyond the end of a short block repeat its first token, which changes no maximum
        q = _at(inputs.q_blocks, inputs.q_side.exists, q_places).to(inputs.q_mean)
        k = _at(inputs.k_blocks, inputs.k_side.exists, k_places).to(inputs.q_mean)
        k = inputs.for_heads(k)
        batch, heads, num_k, width = k.shape[:4]
        flat = k.flatten(2, 3).mT[:, :, None]
        there = inputs.k_side.exists.index_select(-1, index_on(tuple(k_places), k.device))
        real = there & inputs.k_side.grid[:, None]
        gone = ~real.flatten(-2)[..., None, None, :]
        out = []
        for rows in row_parts(q.shape[2], batch * heads * num_k * width * len(q_places)):
            logits = (q[:, :, rows] @ flat * inputs.scale).masked_fill(gone, -torch.inf)
            if self.reduce == "max":
                logits = logits - logits.amax(-1, keepdim=True)
            else:
                logits = logits.log_softmax(-1)
            out.append(logits.unflatten(-1, (num_k, width)).amax((-1, -3)))
        return torch.cat(out, 2).float()


def _at(blocks: torch.Tensor, exists: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Return the tokens at places of each block; its first token where a place is empty."""
    index = index_on(tuple(places), blocks.device)
    there = exists.index_select(-1, index)[..., None]
    return torch.where(there, blocks.index_select(-2, index), blocks[..., :1, :])


@dataclass(frozen=True)
class Antidiagonal(Score):
    """Sums of logits along antidiagonals (Xu et al. 2025, XAttention, arXiv 2503.16428).

    The logits are cut into cells of ``stride`` x ``stride`` tokens, and one antidiagonal is summed
    in each cell. A softmax runs over each row of cells; the score of a block sums its cells.

    Args:
        stride: tokens along each side of a cell.
    """

    stride: int = 16

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        q = _cells(inputs.q_blocks, inputs.q_side.exists, self.stride).flip(-2)
        k = inputs.for_heads(_cells(inputs.k_blocks, inputs.k_side.exists, self.stride))
        q, k = q.flatten(-2).to(inputs.q_mean), k.flatten(-2).to(inputs.q_mean)
        batch, heads, num_k, parts = k.shape[:4]
        offset = torch.arange(parts, device=k.device) * self.stride
        real = (offset < inputs.k_side.length[..., None]) & inputs.k_side.grid[:, None]
        gone = ~real.flatten(-2)[..., None, None, :]
        q_offset = torch.arange(q.shape[3], device=k.device) * self.stride
        flat = k.flatten(2, 3).mT[:, :, None]
        out = []
        for rows in row_parts(q.shape[2], batch * heads * num_k * parts * q.shape[3]):
            logits = q[:, :, rows] @ flat * (inputs.scale / self.stride)
            mass = logits.masked_fill(gone, -torch.inf).softmax(-1)
            mass = mass.unflatten(-1, (num_k, parts)).sum(-1)
            there = q_offset < inputs.q_side.length[..., rows, None]
            out.append((mass * there[..., None]).sum(-2).log())
        return torch.cat(out, 2).float()


def _cells(blocks: torch.Tensor, exists: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the blocks in cells, ``[..., N, parts, stride, D]``; 0 where no token exists."""
    size = blocks.shape[-2]
    parts = math.ceil(size / stride)
    blocks = blocks * exists[..., None]
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, parts * stride - size))
    cells: torch.Tensor = blocks.unflatten(-2, (parts, stride))
    return cells


def register_gate(name: str, gate: Callable[[Inputs], torch.Tensor]) -> None:
    """Register a gate, usable as ``TopBlocks(score="gate:NAME")``.

    A gate is a function that scores blocks, usually a trained one: SeerAttention, VSA and others
    learn the importance of each block.

    Args:
        name: letters, digits, ``_`` and ``-``. A gate of the same name is replaced.
        gate: takes the Inputs of a call (with ``q_mean`` ``[B, H, Nq, D]``, ``k_mean``
            ``[B, H, Nk, D]``, ``q_blocks`` and so on) and returns scores ``[B, H, Nq, Nk]``,
            logarithms of masses up to a constant of each row.

    Raises:
        ValueError: the name has other characters.

    Example:
        >>> from visattn.selectors import TopBlocks, register_gate
        >>> register_gate("dot-product", lambda inputs: inputs.q_mean @ inputs.k_mean.mT)
        >>> TopBlocks(keep=0.2, score="gate:dot-product").score
        'gate:dot-product'
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name={name!r} must consist of letters, digits, _ and -")
    _GATES[name] = gate


@dataclass(frozen=True)
class Gate(Score):
    """The score of a registered gate, which gets the inputs of the whole call."""

    name: str
    row_independent: ClassVar[bool] = False

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        if self.name not in _GATES:
            raise ValueError(
                f"gate {self.name!r} is not registered in this process; call "
                "visattn.selectors.register_gate first"
            )
        scores = _GATES[self.name](inputs)
        shape = (*inputs.q_mean.shape[:3], inputs.k_mean.shape[2])
        if tuple(scores.shape) != shape:
            raise ValueError(
                f"gate {self.name!r} returned scores of shape {list(scores.shape)}; they must be "
                f"{list(shape)}"
            )
        return scores.float()
