"""Models that are split over processes, wrapped or called in another form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support import tiny

import visattn
from trial_cases.case import Case
from visattn import guidance
from visattn.inject import observe
from visattn.patterns import Diagonal


def _refused(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def _forward(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, 3, 12, 8, generator=generator)
    text = torch.randn(1, 6, 16, generator=generator)
    with torch.no_grad():
        out: torch.Tensor = model(hidden, torch.tensor([500]), text, return_dict=False)[0]
    return out


def _edited_while_split(_: Path) -> str:
    pipe = tiny.wan21(layers=2)
    parts = SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)
    pipe.transformer._parallel_config = parts
    for block in (
        visattn.steer(pipe, guidance.ScaleHeads(layers=[0], scale=0.5)),
        visattn.guide(pipe, guidance.PAG(layers=[1], scale=2.0)),
        visattn.guide(pipe, guidance.NAG("blue")),
        observe(pipe, lambda call: None),
    ):
        assert "runs under context parallelism" in _refused(block.__enter__)
    return "edits, guidance, NAG and observers are refused in a sentence"


def _split_by_cache_dit(_: Path) -> str:
    pipe = tiny.wan21(layers=2)
    pipe.transformer._cp_config = object()
    said = _refused(lambda: visattn.apply_plan(pipe, Diagonal(4)))
    assert "the context parallelism of cache-dit" in said, said
    return "a plan is refused in a sentence"


def _wrapped(_: Path) -> str:
    from peft import LoraConfig, get_peft_model

    plain = tiny.wan_transformer(3, layers=2)
    dense = _forward(plain)
    with visattn.sparse(plain, Diagonal(4), guard=False):
        sparse = _forward(plain)
    lora = LoraConfig(target_modules=["to_q"])  # which adds 0
    wrapped = get_peft_model(tiny.wan_transformer(3, layers=2), lora)
    visattn.apply_plan(wrapped, Diagonal(4), guard=False)
    assert not torch.equal(sparse, dense)
    assert torch.equal(_forward(wrapped), sparse)
    visattn.remove_plan(wrapped)
    assert torch.equal(_forward(wrapped), dense)
    return "the plan runs inside and is taken off again"


def _never_called(_: Path) -> str:
    model = tiny.wan_transformer(3, layers=2)
    visattn.apply_plan(model, Diagonal(4), guard=False)
    for block in model.blocks:
        block.forward = lambda hidden, *_, own=block: hidden + own.attn1.forward(hidden)
    _forward(model)
    reasons = [row.reason for row in visattn.summary(model).layers]
    assert all("never called" in str(reason) for reason in reasons), reasons
    return "summary says that the layers were never called"


def _replaced(_: Path) -> str:
    pipe = tiny.wan21(layers=2)
    visattn.apply_plan(pipe, Diagonal(4))
    pipe.transformer = tiny.wan_transformer(5, layers=2)
    text = str(visattn.summary(pipe))
    assert "transformer replaced a denoiser with a plan" in text, text
    return "summary says that the denoiser with the plan is gone"


def _any_arguments(_: Path) -> str:
    kind = type(tiny.wan_transformer(3, layers=1))
    own = kind.forward
    kind.forward = lambda self, *args, **kwargs: own(self, *args, **kwargs)
    try:
        model = tiny.wan_transformer(3, layers=2)
        visattn.apply_plan(model, Diagonal(4), guard=False)
        _forward(model)
        calls = [row.sparse_calls for row in visattn.summary(model).layers]
    finally:
        kind.forward = own
    assert calls == [1, 1], calls
    return "its positions have names, and the plan runs"


CASES = [
    Case("edits and observers under context parallelism", _edited_while_split),
    Case("a plan under the context parallelism of cache-dit", _split_by_cache_dit),
    Case("a plan on a denoiser that PEFT wraps", _wrapped),
    Case("a block that calls attn1.forward itself", _never_called),
    Case("pipe.transformer = other after apply_plan", _replaced),
    Case("a forward of *args that is called by position", _any_arguments),
]
