"""Memory that torch allocates while code runs, on any device: recorded, not measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visattn.attention.dense_attention import dense_with_lse
from visattn.geometry.layout import Grid, TokenLayout
from visattn.guidance.edits.state import State
from visattn.inject.editor import AttentionCall

SIZES = (2048, 4096, 8192)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations give while it is on, the backward's too: ``peak`` of
    those alive at a time, ``largest`` of one. What an operation has inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (ref, _) in self._alive.items() if ref.expired()]:
            del self._alive[key]
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or _storage(tensor) in given:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                size = storage.nbytes()
                self._alive[storage._cdata] = StorageWeakRef(storage), size
                self.largest = max(self.largest, size)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def recorded() -> Iterator[Allocations]:
    """What is allocated inside."""
    with Allocations() as found:
        yield found


def joint_state(
    tokens: int, samples: int = 1, passes: tuple[str, ...] = ("cond",), text: int = 8
) -> State:
    """The last pass of a joint attention call of one head, at step 1 of 2; its kernel is dense."""
    torch.manual_seed(0)
    layout = TokenLayout(Grid(1, tokens // 64, 64), text_before=text)
    batch = samples * len(passes)
    q, k, v = (torch.randn(batch, 1, layout.length, 8) for _ in range(3))

    def kernel(
        part: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: tuple[int, ...] | None = None,
        lse: bool = False,
        again: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return dense_with_lse(q, k, v, 0.3)

    call = AttentionCall(
        role="transformer",
        layer="blocks.0.attn1",
        number=0,
        step=1,
        steps=2,
        passes=passes,
        q=q,
        k=k,
        v=v,
        layout=layout,
        scale=0.3,
        kind="joint",
        kv_layout=layout,
        factor=0.3,
        sparse=False,
        kernel=kernel,
    )
    own = (x[-samples:] for x in (q, k, v))
    return State(call, len(passes) - 1, passes[-1], *own)


def check_linear(make: Callable[[int], Callable[[], object]], heads: int = 1) -> list[int]:
    """Memory grows as the number of tokens does, and no tensor is a map.

    Args:
        make: gives what is to run at a number of tokens; what it makes itself is not counted.
        heads: that a map would have.

    Returns:
        The peaks in bytes at 2k, 4k and 8k tokens.
    """
    peaks = []
    for tokens in SIZES:
        run = make(tokens)
        with recorded() as found:
            run()
        peaks.append(found.peak)
    small, middle, large = peaks
    assert large - middle <= 2.5 * max(middle - small, 1 << 16), peaks
    assert found.largest < heads * SIZES[-1] ** 2, found.largest  # a map of one byte a pair
    return peaks
