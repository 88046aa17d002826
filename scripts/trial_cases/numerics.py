"""What a user sets for all of torch, and memory over many sizes."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

import visattn
from trial_cases.case import Case
from visattn import Grid, Plan, TokenLayout, sparse_attention
from visattn.attention.lowering import MAPS
from visattn.patterns import Dense, Diagonal, HeadPattern, Neighborhood, parse_pattern
from visattn.plan import Rule

LAYOUT = TokenLayout(Grid(3, 8, 8), text_after=5)
TRIED = (
    *("pyramid(block=8, pooled=True)", "top_blocks(0.25, block=8)", "nabla(0.6, None, (1, 2, 2))"),
    *("sparge(0.6, 0.2, 8, 4)", "xattention(0.6, 3, 8)", "top_blocks(0.2, block=8, rest='pooled')"),
    *("cluster_blocks(0.5, 1, 5, 7, 3, 8)", "online_choice((diagonal(3), stripe()), 9, 8)"),
    *("diagonal(9)", "neighborhood((1, 3, 3))", "radial()"),
)


def _qkv(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, 2, LAYOUT.length, 16)
    made = [torch.randn(shape, generator=generator, device="cpu") for _ in range(3)]
    return [x.bfloat16().to(dtype) for x in made]


def _outputs(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    patterns: list[HeadPattern] = [parse_pattern(text) for text in TRIED]
    return [sparse_attention(*_qkv(dtype), pattern, LAYOUT) for pattern in patterns]


def autocast(folder: Path) -> str:
    expected = _outputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [_outputs(torch.bfloat16), _outputs(torch.float32)]
    for outs in found:
        assert all(torch.equal(own, other) for own, other in zip(outs, expected, strict=True))
    return f"{len(TRIED)} patterns give the same with autocast and without"


def hunyuan_under_autocast(folder: Path) -> str:
    from support import tiny

    pipe = tiny.hunyuanvideo()
    visattn.apply_plan(pipe, Diagonal(0.2), guard=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = tiny.generate(pipe, steps=1)
    rows = visattn.summary(pipe).layers
    assert bool(torch.isfinite(latents).all()) and all(row.sparse_calls for row in rows)
    return f"HunyuanVideo runs {len(rows)} sparse layers under autocast"


def validation_before_training(folder: Path) -> str:
    from support import tiny

    heads = (Diagonal(2), Dense(), Neighborhood((1, 3, 3)), parse_pattern(TRIED[1]))
    model = tiny.wan21().transformer.train()
    visattn.apply_plan(model, Plan((Rule(heads),)))
    batch = {
        "hidden_states": torch.randn(1, 4, 3, 12, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 10, 16),
    }
    with torch.inference_mode():
        model(**batch)
    model(**batch)[0].mean().backward()
    with torch.no_grad():
        model(**batch)
    return "backward and no_grad work after a call in inference mode"


def default_device(folder: Path) -> str:
    expected = _outputs()
    MAPS.clear()
    torch.set_default_device("meta")
    try:
        found = _outputs()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    return f"{len(TRIED)} patterns compute tensors on the CPU under another default device"


def memory_of_many_sizes(folder: Path) -> str:
    MAPS.clear()
    limit, MAPS.limit_bytes = MAPS.limit_bytes, 1 << 20
    gc.disable()
    try:
        for width in range(4, 44):
            layout = TokenLayout(Grid(2, 8, width))
            qkv = [torch.randn(1, 2, layout.length, 8) for _ in range(3)]
            sparse_attention(*qkv, (Diagonal(9), Neighborhood((1, 3, 3))), layout)
        kept = MAPS.nbytes
        own = next(iter(MAPS._items.values()))
        assert own.made, "what a map has been made into is not known to it"
        MAPS.clear()
    finally:
        gc.enable()
        MAPS.limit_bytes = limit
    assert kept <= 3 << 19, kept
    return f"80 maps with what is made of them hold {kept / 2**20:.1f} MiB at a limit of 1 MiB"


CASES = (
    Case("dynamic patterns are wrong under autocast", autocast),
    Case("HunyuanVideo with a plan fails under autocast", hunyuan_under_autocast),
    Case("training fails after validation in inference mode", validation_before_training),
    Case("the default device breaks calls on the CPU", default_device),
    Case("memory grows with the number of sizes", memory_of_many_sizes),
)
