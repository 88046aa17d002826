"""Every launch is made with the device of its tensors as the current one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.selectors_oracle import LAYOUTS, SCALE, tensors

from visattn import TokenLayout, sparse_attention
from visattn.attention.backends.triton_kernels import triton_attention
from visattn.attention.spec import AttentionSpec
from visattn.kernels.launch import interpreting
from visattn.patterns import AxisOrder, Diagonal, Pattern
from visattn.selectors import MoBA, Pyramid, TopBlocks
from visattn.selectors.selector import Stages
from visattn.selectors.stages.choose import TopP

pytestmark = pytest.mark.skipif(not interpreting(), reason="records what the interpreter runs")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class OfHeads(TopBlocks):
    """The blocks of a head compete by their mass."""

    def stages(self, layout: TokenLayout) -> Stages:
        return replace(super().stages(layout), choose=TopP(0.6, scope="head"))


def launched_somewhere() -> set[str]:
    """Names of the kernels that functions of kernels/ launch, but that of Gluon, which has no
    interpreter."""
    return {
        node.func.value.id
        for path in KERNELS.glob("*.py")
        if path.stem != "hopper"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("_kernel")
    }


@pytest.mark.second
def test_launches_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    current: list[torch.device] = []
    launches: dict[str, set[torch.device | None]] = {}

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    own = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = current[-1] if current else None
        launches.setdefault(self.__name__, set()).add(found)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    layout = LAYOUTS["line"]
    patterns: tuple[Pattern, ...] = (Diagonal(4), AxisOrder(Diagonal(4), "wht"))
    heads = [
        patterns,
        MoBA(0.3, block=4),
        Pyramid(block=4, pooled=True),
        OfHeads(0.3, block=4),
    ]
    for pattern in heads:
        q, k, v = (x[:, :2].float().requires_grad_() for x in tensors(layout, 1))
        out = sparse_attention(q, k, v, pattern, layout, backend="triton")  # type: ignore[call-overload]
        out.sum().backward()

    layout = LAYOUTS["odd"]  # of two blocks, which are two parts of a row
    q, k, v = (x[:, :2].float() for x in tensors(layout, 1))
    triton_attention(q, k, v, AttentionSpec(patterns, layout, scale=SCALE), split=1)
    assert set(launches) == launched_somewhere()
    assert set.union(*launches.values()) == {torch.device("cpu")}
    assert not current
