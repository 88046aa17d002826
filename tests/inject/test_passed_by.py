"""Calls that pass a plan by are told, and calls in another form are not lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from support import tiny

from visattn.inject import apply_plan, remove_plan, sparse, summary
from visattn.inject.hooks.argument_names import argument_names
from visattn.patterns import Diagonal

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(1, 4, 3, 12, 8, generator=GENERATOR)
TEXT = torch.randn(1, 6, 16, generator=GENERATOR)
TIME = torch.tensor([500])


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(HIDDEN, TIME, TEXT, return_dict=False)[0]


@pytest.mark.parametrize(
    "aside",
    [lambda own, hidden: own.processor(own, hidden), lambda own, hidden: own.forward(hidden)],
    ids=["processor", "forward"],
)
def test_a_module_that_is_never_called_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    aside: Callable[[Any, torch.Tensor], torch.Tensor],
) -> None:
    """A block of somebody else's that computes the attention of its module without calling it."""

    def own(self: Any, hidden: torch.Tensor, text: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden + aside(self.attn1, hidden)

    monkeypatch.setattr(WanTransformerBlock, "forward", own)
    model = tiny.wan_transformer(3, layers=2)
    dense = forward(model)
    apply_plan(model, Diagonal(4))
    with caplog.at_level(logging.WARNING, "visattn"):
        for _ in range(2):
            assert torch.equal(forward(model), dense)
    rows = summary(model).layers
    assert [(row.sparse_calls, row.dense_calls) for row in rows] == [(0, 0)] * 2
    assert all("it was never called when its model ran" in str(row.reason) for row in rows)
    assert sum("was never called when its model ran" in text for text in caplog.messages) == 2


def test_a_module_that_is_called_is_not(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.wan_transformer(3, layers=2)
    apply_plan(model, Diagonal(4))
    forward(model)
    assert [row.reason for row in summary(model).layers] == [None] * 2
    assert not caplog.messages


def test_another_denoiser_in_the_place_of_one_with_a_plan_is_told() -> None:
    pipe = tiny.wan21(layers=2)
    own, other = pipe.transformer, tiny.wan_transformer(5, layers=2)
    apply_plan(pipe, Diagonal(4))
    assert summary(pipe).replaced == ()
    pipe.transformer = other
    found = summary(pipe)
    assert found.replaced == ("transformer",)
    assert "transformer replaced a denoiser with a plan and has no plan" in str(found)
    assert found.numbers()["replaced"] == ["transformer"]
    with sparse(pipe, Diagonal(4)):
        assert summary(pipe).replaced == ()
    assert summary(pipe).replaced == ("transformer",)
    pipe.transformer = own
    assert summary(pipe).replaced == ()
    remove_plan(pipe)
    pipe.transformer = other
    assert summary(pipe).replaced == ()
    assert not [name for name in vars(pipe) if "visattn" in name]


def test_a_forward_of_any_arguments_is_called_by_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.wan_transformer(3, layers=2)
    with sparse(model, Diagonal(4)):
        expected = forward(model)
    own = WanTransformer3DModel.forward

    def any_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", any_forward)
    with sparse(model, Diagonal(4)):
        assert torch.equal(forward(model), expected)
        assert [row.sparse_calls for row in summary(model).layers] == [1, 1]


def test_positions_without_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not reached")

    # a class whose source nobody has
    kind = type("Made", (WanTransformer3DModel,), {"forward": any_forward})
    monkeypatch.setattr(WanTransformer3DModel, "forward", any_forward)
    monkeypatch.setattr("inspect.getsource", lambda _: (_ for _ in ()).throw(OSError()))
    model = tiny.wan_transformer(3, layers=2)
    model.__class__ = kind
    with (
        sparse(model, Diagonal(4)),
        pytest.raises(TypeError, match="Made was called with 3 arguments by position"),
    ):
        forward(model)


def test_source_that_cannot_be_read_alone_names_no_argument() -> None:
    class Known:
        def forward(self, hidden: Any, text: Any) -> None: ...

    class Indented(Known):
        """Its text begins where the class does not:
here."""  # fmt: skip

        def forward(self, *args: Any) -> None: ...

    assert argument_names(Known) == ("hidden", "text")
    assert argument_names(Indented) == ("hidden", "text")
