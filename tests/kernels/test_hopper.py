"""The kernel for Hopper on such a GPU, against the float64 oracle, within the bound of the others;
what it reads and which calls it takes, on any machine. Triton's interpreter has no such kernels;
``tests/blocks/test_bit_masks.py`` holds the lists that it reads to the rules."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import LAYOUTS
from support.kernel_cases import GPU, MIXED, UNIONS, case, inputs

from visattn import sparse_attention
from visattn.attention.backends import triton_kernels as triton_backend
from visattn.kernels.targets import LAUNCHES
from visattn.patterns import PATTERNS, Dense, Diagonal, Neighborhood, Pattern, Skip

TEXTS = ["two_grids_text_between", "prefix_and_text"]
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
SETTINGS = LAUNCHES["sm_90"][2][128]
DIMS = {torch.float16: (64, 72), torch.bfloat16: (40, 128)}

spec = importlib.util.spec_from_file_location(
    "forward_cases", Path(__file__).with_name("test_forward.py")
)
assert spec is not None and spec.loader is not None
forward_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forward_cases)
check = forward_cases.check

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="no GPU of capability 9.0"),
]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls that the kernel takes, without those of its trial; a test on a GPU fails where there is
    none, as where the trial has failed."""
    calls: list[int] = []
    own = triton_backend._takes_groups

    def counted(*args: Any) -> bool:
        takes = own(*args)
        calls.extend([1] * takes)
        return takes

    monkeypatch.setattr(triton_backend, "_takes_groups", counted)
    return calls


@pytest.mark.parametrize(
    "name", ["contiguous", "diffusers", "one head", "one token", "unaligned", "padded", "sliced"]
)
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_copies_find_every_key(name: str, dim: int) -> None:
    """Rows and columns of a descriptor are those of a batch item, slot and key; what no copy could
    read is copied first."""
    hopper = pytest.importorskip("visattn.kernels.hopper")
    descriptors = pytest.importorskip("visattn.kernels.descriptors")
    batch, slots, length = 2, 1 if name == "one head" else 3, 1 if name == "one token" else 70
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, slots, length, dim, generator=generator).half()
    if name == "diffusers":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif name == "unaligned":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    elif name == "padded":
        x = torch.nn.functional.pad(x, (0, 3))[..., :dim]
    elif name == "sliced":
        x = torch.cat([x, x], 1)[:, :slots]
    box, (item, slot, column) = descriptors.key_descriptor(x, hopper.BLOCK_K, hopper.WIDTH)
    for b in range(batch):
        for s in range(slots):
            first = b * item + s * slot
            matrix = box.base.as_strided(box.shape, box.strides, box.base.storage_offset())
            own = matrix[first : first + length, s * column : s * column + dim]
            assert torch.equal(own, x[b, s])


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", DIMS, ids=str)
    @pytest.mark.parametrize("name", PATTERNS)
    def test_every_pattern(self, name: str, dtype: torch.dtype, taken: list[int]) -> None:
        for layout_name in ("video_8x8x8_aligned", "video_4x11x7_unaligned"):
            pattern, layout, _ = case(name, layout_name)
            for dim in DIMS[dtype]:
                qkv = inputs(layout, 2, 1, dim, dtype)
                check(qkv, [pattern, Dense()], layout, settings=SETTINGS)
        assert len(taken) == 4

    @pytest.mark.parametrize("layout_name", TEXTS)
    def test_text_and_several_grids(self, layout_name: str, taken: list[int]) -> None:
        """Of known lengths and of those of a call, past whose ends there may be anything."""
        for name in ("neighborhood", "radial", "stripe"):
            pattern, layout, lengths = case(name, layout_name)
            assert lengths is not None
            q, k, v = inputs(layout, 2, 1, 64, torch.float16)
            check([q, k, v], [pattern, Dense()], layout, settings=SETTINGS)
            check([q, k, v], [pattern, Dense()], layout, lengths, settings=SETTINGS)
            run = partial(
                sparse_attention,
                pattern=[pattern, Dense()],
                layout=layout,
                text_lengths=lengths,
                backend="triton",
            )
            plain = run(q, k, v)
            text = next(n for n, own in enumerate(layout.segments) if own.kind == "text")
            first = layout.starts[text] + int(lengths[0])  # past its end
            for x in (k, v):
                x[:, :, first] = torch.nan
            here = torch.arange(layout.length, device=q.device) != first
            assert torch.equal(run(q, k, v)[:, :, here], plain[:, :, here])
        assert len(taken) == 12

    @pytest.mark.parametrize("split", [1, 2, 5])
    def test_rows_in_parts(self, split: int, taken: list[int]) -> None:
        layout = LAYOUTS["video_8x8x8_aligned"]
        patterns: list[Pattern] = [Dense(), Neighborhood((3, 3, 3)), Skip()]
        for dim in (64, 128):
            qkv = inputs(layout, 3, 1, dim, torch.float16)
            check(qkv, patterns, layout, settings=SETTINGS, split=split)
        assert taken

    def test_mixed_heads_batch_and_grouped_queries(self, taken: list[int]) -> None:
        layout = LAYOUTS["video_5x5x5"]
        for key_heads in (4, 2, 1):
            qkv = inputs(layout, 4, key_heads, 128, torch.float16, batch=2)
            check(qkv, MIXED, layout, settings=SETTINGS)
        assert taken

    @pytest.mark.parametrize("name", UNIONS)
    def test_every_kind_of_predicate(self, name: str, taken: list[int]) -> None:
        layout = LAYOUTS["video_5x5x5"]
        qkv = inputs(layout, 2, 2, 64, torch.float16)
        check(qkv, [UNIONS[name], Diagonal(0)], layout, settings=SETTINGS)
        assert taken

    @pytest.mark.parametrize("dim", [64, 80, 128])
    def test_strides(self, dim: int, taken: list[int]) -> None:
        """``[B, L, H, D]``, as diffusers hands them over, and rows that no copy can read."""
        layout = LAYOUTS["video_8x8x8_aligned"]
        qkv = inputs(layout, 4, 4, dim, torch.float16, batch=2)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
        uneven = [torch.nn.functional.pad(x, (0, 3))[..., :dim] for x in turned]
        for tensors in (turned, uneven):
            check(tensors, [Dense()] * 4, layout, settings=SETTINGS)
            check(tensors, [Dense(), *[Neighborhood(3)] * 3], layout, settings=SETTINGS)
        assert taken

    def test_large_logits_and_scales(self, taken: list[int]) -> None:
        layout = LAYOUTS["video_8x8x8_aligned"]
        q, k, v = inputs(layout, 1, 1, 64, torch.float16)
        check([20 * q, 20 * k, v], [Neighborhood(3)], layout, settings=SETTINGS)
        check([q, k, v], [Neighborhood(3)], layout, settings=SETTINGS, scale=1.0)
        assert len(taken) == 2
        check([q, k, v], [Neighborhood(3)], layout, settings=SETTINGS, scale=-0.3)
        assert len(taken) == 2  # its largest logit would be the smallest one
