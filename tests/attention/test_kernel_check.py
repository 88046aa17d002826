"""What happens when the kernel for Hopper does not run, or is wrong: it is told, and not used."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from visattn.attention.backends import kernel_check as trial
from visattn.attention.backends.kernel_check import LAYOUT, Variant, trusted
from visattn.attention.backends.reference import reference_attention
from visattn.attention.spec import AttentionSpec
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.runtime.log_once import warn_once

CPU = torch.device("cpu")
hopper = pytest.importorskip("visattn.kernels.hopper")
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FAILURES", {})
    warn_once.cache_clear()


def right(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: dict[str, torch.Tensor],
    lengths: torch.Tensor | None,
    scale: float,
    *,
    q_ordered: bool,
    num_parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, of keys that are put back in their order."""
    patterns = (Diagonal(100), Dense())
    if q_ordered:
        patterns = (Neighborhood((3, 5, 9)), Dense())
        index = lists["k_index"].long()
        for x in (k, v):
            for slot in range(2):
                x[:, slot] = x[:, slot].clone()[:, index[slot].argsort()]
    assert (num_parts > 0) == bool((lists["work"][:, 6] >= 0).any())
    spec = AttentionSpec(patterns, LAYOUT, text_lengths=lengths, scale=scale)
    return reference_attention(q, k, v, spec)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Forward], None]:
    """Puts a function in the kernel's place."""
    from visattn.kernels import permute

    def gathered(k, v, heads, orders, index):  # type: ignore[no-untyped-def]
        rows = [index[order].long() for order in orders]
        return tuple(
            torch.stack([x[:, h][:, r] for h, r in zip(heads, rows, strict=True)], 1)
            for x in (k, v)
        )

    monkeypatch.setattr(permute, "permute", gathered)
    return lambda function: monkeypatch.setattr(hopper, "forward_hopper", function)


VARIANTS = [
    Variant(CPU, torch.float16, 64, ordered, lengths, split)
    for ordered in (False, True)
    for lengths in (False, True)
    for split in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v[3:])))
def test_a_right_kernel_is_trusted(
    variant: Variant, kernel: Callable[[Forward], None], caplog: pytest.LogCaptureFixture
) -> None:
    kernel(right)
    assert trusted(variant) and not caplog.records


@pytest.mark.parametrize("spoilt", ["output", "lse", "nan"])
def test_a_wrong_one_is_told_once(
    spoilt: str, kernel: Callable[[Forward], None], caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)  # type: ignore[arg-type]
        if spoilt == "output":
            out[0, 1, 300] += 0.1
        elif spoilt == "lse":
            lse[0, 0, 7] += 0.1
        else:
            out[0, 0, 0, 0] = torch.nan
        return out, lse

    kernel(wrong)
    with caplog.at_level(logging.WARNING):
        assert not trusted(VARIANTS[0]) and not trusted(VARIANTS[0])
    (record,) = caplog.records
    assert record.getMessage().startswith("the kernel for Hopper is off by ")
    assert record.getMessage().endswith("the portable one runs, which is slower")


def test_a_capture_before_the_trial_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph keeps what ran when it was captured; after it the kernel is tried as ever."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    variant = VARIANTS[0]._replace(device=torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        assert not trusted(variant) and not trusted(variant)
    (record,) = caplog.records
    assert "torch.float16 at head size 64" in record.getMessage()
    assert record.getMessage().endswith("call the layer once before the capture")
    assert variant not in trial._FAILURES


def test_one_that_does_not_compile_is_told_with_the_reason(
    kernel: Callable[[Forward], None], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AttributeError("module 'mbarrier' has no attribute 'expect'")

    kernel(broken)
    with caplog.at_level(logging.WARNING):
        assert not trusted(VARIANTS[0])
    assert "does not run (AttributeError: module 'mbarrier' has no" in caplog.text


def test_an_error_of_the_device_is_not_swallowed(kernel: Callable[[Forward], None]) -> None:
    def lost(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    kernel(lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trusted(VARIANTS[0])


def test_the_case_has_blocks_of_each_kind() -> None:
    assert isinstance(LAYOUT, TokenLayout)
    for pattern in (Neighborhood((3, 5, 9)), Diagonal(100)):
        own = pattern.lower(LAYOUT, 128, 64)
        full, text, short, partial = (
            int((own.bounds[:, n + 1] - own.bounds[:, n]).sum()) for n in range(4)
        )
        assert min(full, text, short, partial) > 0
