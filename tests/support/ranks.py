"""One of two processes that run tiny pipelines under the parallelism of diffusers. What it finds,
by name, it writes to a file: ``python ranks.py RANK FOLDER``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import visattn  # isort: skip  # it mends torchvision, which diffusers may import

import diffusers.hooks.tensor_parallel as tensor_parallel
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from support import tiny, tiny_images

from visattn import guidance
from visattn.inject import observe, summary
from visattn.patterns import Diagonal

FOUND: dict[str, Any] = {}


def wan(steps: int = 2, **options: Any) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A pipeline, and its generation."""
    pipe = tiny.wan21(layers=2)
    return pipe, lambda: tiny.generate(pipe, steps=steps, **options)


def flux() -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe = tiny_images.flux()
    return pipe, lambda: tiny_images.generate(pipe, steps=2)


def split(pipe: Any) -> None:
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().max())


def refused(act: Callable[[], object]) -> str:
    """The error of an act."""
    try:
        act()
    except Exception as error:  # of any type, which the test looks at
        return f"{type(error).__name__}: {error}"
    return "nothing"


def inside(block: Any, act: Callable[[], object] = lambda: None) -> Callable[[], object]:
    """An act inside a ``with`` block."""

    def enter() -> None:
        with ExitStack() as stack:
            stack.enter_context(block())
            act()

    return enter


def calls(pipe: Any) -> list[Any]:
    """Sparse and dense calls of the layers with a plan, and why they were dense."""
    return sorted({(row.sparse_calls, row.dense_calls, row.reason) for row in summary(pipe).layers})


def dense_under_a_plan() -> None:
    for name, make in (("wan", wan), ("flux", flux)):
        pipe, generate = make()
        exact = generate()
        split(pipe)
        dense = generate()
        FOUND[f"{name} without a plan"] = off(dense, exact)
        visattn.apply_plan(pipe, Diagonal(4))
        FOUND[f"{name} split, then plan"] = off(generate(), dense), calls(pipe)
        visattn.remove_plan(pipe)
        FOUND[f"{name} without its plan again"] = off(generate(), dense)

        pipe, generate = make()
        visattn.apply_plan(pipe, Diagonal(4))
        split(pipe)
        FOUND[f"{name} plan, then split"] = off(generate(), dense), calls(pipe)
        visattn.remove_plan(pipe)
        FOUND[f"{name} without its first plan"] = off(generate(), dense)

        pipe, generate = make()
        split(pipe)
        visattn.apply_plan(pipe, Diagonal(4))
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=name == "flux")
        FOUND[f"{name} compiled"] = off(generate(), dense), calls(pipe)
        torch.compiler.reset()
    pipe, generate = flux()
    split(pipe)
    visattn.apply_plan(pipe, Diagonal(4))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    FOUND["whole model compiled"] = off(generate(), dense), calls(pipe)
    torch.compiler.reset()


def own_backends() -> None:
    """A backend of the user's that knows nothing of context parallelism."""
    pipe, generate = wan()
    visattn.apply_plan(pipe, Diagonal(4))
    split(pipe)
    with attention_backend("_native_math"):
        FOUND["an active backend without it"] = refused(generate)
    pipe, _ = wan()
    pipe.transformer.set_attention_backend("_native_math")
    visattn.apply_plan(pipe, Diagonal(4))
    FOUND["a backend of its own without it"] = refused(lambda: split(pipe))
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def blocks(pipe: Any) -> dict[str, Callable[[], Any]]:
    """What sees or changes attention inside a ``with`` block."""
    nag = guidance.NAG("blue circle")
    skip = guidance.SkipBlock(blocks=[1])
    return {
        "observe": lambda: observe(pipe, lambda call: None),
        "edit": lambda: visattn.steer(pipe, guidance.ScaleHeads(layers=[0], scale=0.5)),
        "block edit": lambda: visattn.steer(pipe, skip),
        "guidance": lambda: visattn.guide(pipe, guidance.PAG(layers=[1], scale=2.0)),
        "nag": lambda: visattn.guide(pipe, nag),
    }


def refusals() -> None:
    for name, make in (("wan", wan), ("flux", flux)):
        pipe, generate = make()
        split(pipe)
        for kind, block in blocks(pipe).items():
            FOUND[f"{name} split, then {kind}"] = refused(inside(block))
        FOUND[f"{name} left"] = calls(pipe)
        for kind in blocks(pipe) if name == "wan" else ("nag",):
            pipe, generate = make()

            def act(pipe: Any = pipe, generate: Any = generate) -> None:
                split(pipe)
                generate()

            FOUND[f"{name} {kind}, then split"] = refused(inside(blocks(pipe)[kind], act))
    pipe, _ = wan()
    split(pipe)
    call = {"num_inference_steps": 2, "height": 96, "width": 64, "num_frames": 9}
    FOUND["search"] = refused(lambda: visattn.search(pipe, ["a"], max_error=0.1, call=call))
    FOUND["search_heads"] = refused(
        lambda: visattn.search_heads(pipe, lambda frames, prompt: 0.0, ["a"], k=1, call=call)
    )


def tensor() -> None:
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    for order in ("plan, then heads", "heads, then plan"):
        pipe, generate = flux()
        exact = generate()
        if order == "plan, then heads":
            visattn.apply_plan(pipe, Diagonal(4))
        pipe.transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
        if order == "heads, then plan":
            visattn.apply_plan(pipe, Diagonal(4))
        FOUND[order] = off(generate(), exact), calls(pipe)
    for kind, block in blocks(pipe).items():
        FOUND[f"heads, then {kind}"] = refused(inside(block))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.accelerator.device_count = lambda: 1  # diffusers takes the rank modulo this
    address = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for part in (dense_under_a_plan, own_backends, refusals, tensor):
        part()
    (folder / f"{rank}.json").write_text(json.dumps(FOUND))
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
