"""The running call of a denoiser with a plan: two at once, compiled, run again, pickled, freed."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from support import tiny
from torch._dynamo.testing import CompileCounter

from trial_cases.case import Case
from visattn import apply_plan, guide, sparse, summary
from visattn.guidance import SEG
from visattn.patterns import Diagonal

__all__ = ["CASES"]

PLAN = Diagonal(0.1)


def arguments(frames: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Of a call at a size in tokens."""
    torch.manual_seed(width)
    return {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 10, 16),
    }


def model_of(layers: int = 1) -> Any:
    return tiny.wan_transformer(1, layers=layers)


def two_requests(folder: Path) -> str:
    pipe = tiny.wan21(layers=2)
    apply_plan(pipe, PLAN, guard=False)
    pipes = [
        type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler)) for _ in range(2)
    ]
    sizes = ({"height": 96, "width": 64}, {"height": 64, "width": 96})
    alone = [tiny.generate(one, **size) for one, size in zip(pipes, sizes, strict=True)]
    meeting, found = threading.Barrier(2), {}

    def meet(*_: Any) -> None:
        meeting.wait(60)

    def run(number: int) -> None:
        found[number] = tiny.generate(pipes[number], **sizes[number])

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert all(torch.equal(found[number], alone[number]) for number in range(2))
    assert all(row.reason is None for row in summary(pipe).layers)
    return "both videos are what each request gives alone"


def resolutions(folder: Path) -> str:
    graphs = []
    for plan in (None, PLAN):
        torch._dynamo.reset()
        model, counter = model_of(), CompileCounter()
        if plan is not None:
            apply_plan(model, plan, guard=False)
        model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for number in range(11):
                model(**arguments(2 + number % 3, 4 + number // 3, 4))
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] == graphs[1], graphs
    return f"{graphs[1]} graphs for 11 resolutions, as without a plan"


def checkpointing(folder: Path) -> str:
    gradients = []
    for again in (False, True):
        model = model_of().train()
        if again:
            model.enable_gradient_checkpointing()
        apply_plan(model, PLAN, guard=False)
        outs = [model(**arguments(*size)).sample for size in ((3, 6, 4), (3, 4, 6))]
        sum((out**2).mean() for out in outs).backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad)
    torch.testing.assert_close(*gradients)
    return "gradients of two sizes at once are those without checkpointing"


def late_backward(folder: Path) -> str:
    model = model_of().train()
    model.enable_gradient_checkpointing()
    with sparse(model, PLAN, guard=False):
        loss = model(**arguments(3, 6, 4)).sample.mean()
    said = "nothing"
    try:
        loss.backward()
    except RuntimeError as error:
        said = str(error)
    assert "call backward before the plan is removed" in said, said
    return "refused in a sentence"


def pickled(folder: Path) -> str:
    model = model_of()
    with torch.no_grad():
        dense = model(**arguments(3, 6, 4)).sample
        apply_plan(model, PLAN, guard=False)
        torch.save(model, folder / "model.pt")
        read = torch.load(folder / "model.pt", weights_only=False)
        torch.testing.assert_close(read(**arguments(3, 6, 4)).sample, dense)
    assert b"visattn" not in pickle.dumps(model)
    return "what is read is the model without the plan"


def freed(folder: Path) -> str:
    model = model_of()
    apply_plan(model, PLAN, guard=False)
    with torch.no_grad():
        model(**arguments(3, 6, 4))
    found = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert found() is None
    finally:
        gc.enable()
    return "freed at once"


def one_guided_request(folder: Path) -> str:
    pipe = tiny.wan21(layers=2)
    said: list[str] = []

    def second() -> None:
        try:
            tiny.generate(pipe)
        except RuntimeError as error:
            said.append(str(error))

    def meanwhile(*_: Any) -> None:
        if not said:
            own = threading.Thread(target=second)
            own.start()
            own.join()

    with guide(pipe, SEG(layers=[1])):
        alone = tiny.generate(pipe)
        handle = pipe.transformer.blocks[0].register_forward_pre_hook(meanwhile)
        found = tiny.generate(pipe)
        handle.remove()
        assert torch.equal(found, alone)
    assert len(said) == 1 and "run one request at a time" in said[0], said
    return "the second is refused, the first is what it is alone"


CASES = (
    Case("two requests at once over one denoiser", two_requests),
    Case("two requests at once inside guide", one_guided_request),
    Case("a graph for each resolution", resolutions),
    Case("gradient checkpointing of two sizes", checkpointing),
    Case("backward after the plan has ended", late_backward),
    Case("a model with a plan is saved by torch.save", pickled),
    Case("a dropped denoiser waits for the garbage collector", freed),
)
