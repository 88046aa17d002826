"""What cache-dit puts on a denoiser, by stand-ins of the same form: it is no dependency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support import tiny

from visattn import guidance, guide
from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Diagonal


class CachedBlocks(torch.nn.Module):
    """All blocks of a denoiser as one, as long as it runs."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, *args, **kwargs)
        return hidden


@contextmanager
def cached(model: Any) -> Iterator[None]:
    """``cache_dit.enable_cache`` as far as the blocks go."""
    own = model.forward
    one = torch.nn.ModuleList([CachedBlocks(model.blocks)])

    def forward(*args: Any, **kwargs: Any) -> Any:
        with patch.object(model, "blocks", one):
            return own(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def test_nag_finds_its_layers_in_cached_blocks() -> None:
    pipe = tiny.wan21(layers=2)
    nag = guidance.NAG("blue circle", scale=4.0)
    with guide(pipe, nag):
        expected = tiny.generate(pipe, steps=2)
    assert not torch.equal(expected, tiny.generate(pipe, steps=2))
    with cached(pipe.transformer), guide(pipe, nag):
        assert torch.equal(tiny.generate(pipe, steps=2), expected)


def test_a_plan_runs_in_cached_blocks() -> None:
    pipe = tiny.wan21(layers=2)
    apply_plan(pipe, Diagonal(4))
    expected = tiny.generate(pipe, steps=2)
    with cached(pipe.transformer):
        assert torch.equal(tiny.generate(pipe, steps=2), expected)
    assert [row.reason for row in summary(pipe).layers] == [None, None]


def test_its_context_parallelism_takes_no_plan() -> None:
    pipe = tiny.wan21(layers=2)
    said = "transformer has the context parallelism of cache-dit, whose attention takes no plan"
    apply_plan(pipe, Diagonal(4))
    pipe.transformer._cp_config = object()
    with pytest.raises(ValueError, match=said):
        tiny.generate(pipe, steps=1)
    remove_plan(pipe)
    with pytest.raises(ValueError, match=said):
        apply_plan(pipe, Diagonal(4))
    assert summary(pipe).layers == ()
    tiny.generate(pipe, steps=1)
