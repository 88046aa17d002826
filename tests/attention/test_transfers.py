"""What a call copies between the host and a device, and what it reads back: nothing where patterns
are static, after a first call; of dynamic ones no more than a table says.

Tensors on ``meta`` stand for those of a GPU, and launches of kernels do nothing.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from support.cases import EXAMPLES
from support.selectors_oracle import small

from visattn import Grid, TokenLayout
from visattn.attention.backends import triton_kernels as triton_backend
from visattn.attention.checks import check_call
from visattn.attention.compiled_op import attention_op, backward_op, dynamic_op
from visattn.attention.dispatch import execute, execute_backward
from visattn.attention.spec import AttentionSpec, Choice
from visattn.inject.layers.compiled_layer import begin_op, layer_op
from visattn.kernels.targets import backward_settings, launch_settings
from visattn.patterns import HeadPattern, Neighborhood, Skip
from visattn.selectors import SELECTORS, Agent
from visattn.selectors.attend import dynamic_triton as device
from visattn.selectors.attend import gradients

META = torch.device("meta")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
LAYOUT = TokenLayout(Grid(6, 8, 8), text_before=5, text_after=70)
SMALL = TokenLayout(Grid(3, 5, 6), text_before=5, text_after=9)
# What a call with a dynamic pattern makes a GPU and its host wait for, by the kernels. The numbers
# may only fall.
WAITS = {"moba": 3}  # the pairs of queries and blocks, their tiles, and the widest row


class Made(TorchFunctionMode):
    """Counts the tensors that are made of lists on a device: they are copied to it, and no op
    shows it."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.found["copies"] += out.is_meta
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found["copies"] += sum(isinstance(x, list) for x in index)
        return out


class Moved(TorchDispatchMode):
    """Counts the ops that copy to the device, and those that read back from it, whose results it
    makes up."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(x.is_meta for x in tensors)
        here = any(not x.is_meta and x.ndim > 0 for x in tensors)
        if here and (there or (target is not None and torch.device(target).type == "meta")):
            self.found["copies"] += 1
        if not there:
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.found["reads"] += 1
            return 1
        if name == "_to_copy" and target is not None and torch.device(target).type == "cpu":
            self.found["reads"] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "nonzero":
            self.found["reads"] += 1
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device=META)
        assert name not in ("masked_select", "unique_dim", "_unique2", "unique_consecutive")
        if name in ("index", "index_put", "index_put_"):
            masks = [x is not None and x.dtype == torch.bool for x in args[1]]
            self.found["reads"] += sum(masks)
        return func(*args, **kwargs)


class Launched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launches of an A100, which do nothing."""
    for path in KERNELS.glob("*.py"):
        if path.stem != "hopper":
            module = importlib.import_module(f"visattn.kernels.{path.stem}")
            for kernel in [x for x in vars(module) if x.endswith("_kernel")]:
                monkeypatch.setattr(module, kernel, Launched())

    def launch_of(q: torch.Tensor) -> object:
        return launch_settings("sm_80", q.dtype, q.shape[3])

    def backward_launch_of(q: torch.Tensor, spare: bool = False) -> object:
        own = backward_settings("sm_80", q.dtype, q.shape[3])
        own = own.spared() if spare else own
        return (own.block_q, own.block_k), (own.queries, own.masked), own.warps, own.stages

    for module in (triton_backend, device):
        monkeypatch.setattr(module, "launch_of", launch_of)
    for module in (triton_backend, gradients):
        monkeypatch.setattr(module, "backward_launch_of", backward_launch_of)
    yield
    triton_backend.DEVICE_MAPS.clear()


def waits(
    patterns: tuple[HeadPattern, ...], backend: str, layout: TokenLayout, *, backward: bool = False
) -> Counter[str]:
    """What a second call waits for, with text lengths on the device."""
    heads = len(patterns)
    q, k, v, grad = (
        torch.empty(2, heads, layout.length, 32, device=META, dtype=torch.float16) for _ in range(4)
    )
    found: Counter[str] = Counter()
    for _ in range(2):
        found.clear()
        with torch.no_grad(), Made(found), Moved(found):
            given = torch.empty(2, len(layout.texts), dtype=torch.int64, device=META)
            spec = AttentionSpec(
                patterns,
                layout,
                text_lengths=given,
                scale=0.2,
                backend=backend,
                return_lse=not any(isinstance(item, Agent) for item in patterns),
                choice=Choice(backend, "asked for"),
            )
            spec = check_call(q, k, spec)
            out, lse = execute(q, k, v, spec)
            if backward:
                assert lse is not None
                given = (q, k, v, out, lse, grad, torch.empty_like(lse))
                execute_backward(*given, spec)
    return +found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_a_static_call_waits_for_nothing(backend: str) -> None:
    """All patterns, one on each head: masks are bits then; and one whose masks are a rule."""
    assert not waits(tuple(EXAMPLES.values()), backend, LAYOUT, backward=True)
    assert not waits((Neighborhood(3), Skip()), backend, LAYOUT, backward=True)


@pytest.mark.second
def test_dynamic_calls_wait_as_the_table_says() -> None:
    found = {
        name: sum(waits((small(name), small(name), Skip(), Skip()), "triton", SMALL).values())
        for name in SELECTORS
    }
    assert {name: count for name, count in found.items() if count} == WAITS


def test_ops_that_no_graph_may_hold_are_tagged() -> None:
    unsafe = torch.Tag.cudagraph_unsafe
    tagged = {
        op._qualname
        for op in (attention_op, backward_op, dynamic_op, begin_op, layer_op)
        if unsafe in op._opoverload.tags
    }
    assert tagged == {
        "visattn::dynamic_attention",
        "visattn::begin_call",
        "visattn::layer_attention",
    }
