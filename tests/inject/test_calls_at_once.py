"""Several requests at once over one denoiser that has a plan: each gets what it would get alone."""

import asyncio
import copy
import threading

import pytest
import torch
from support import tiny
from support.planned import PLAN, VARIED

from visattn.inject import apply_plan, summary
from visattn.plan import Plan, Rule
from visattn.selectors import Reuse, TopBlocks

# equally many tokens, so that the length of a call does not tell them apart
SIZES = ({"height": 96, "width": 64}, {"height": 64, "width": 96})


def together(runs, model):
    """The results of functions that run in a thread each, and meet inside each call of a model."""
    meeting, found = threading.Barrier(len(runs)), [None] * len(runs)

    def work(number):
        try:
            found[number] = runs[number]()
        except BaseException as error:
            meeting.abort()
            found[number] = error

    def meet(*_):
        meeting.wait(60)

    handle = model.blocks[0].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (VARIED, SIZES),
        # what a dynamic pattern keeps from step to step is of one request
        (Plan((Rule(Reuse(TopBlocks(0.3, block=8), every=9)),)), (SIZES[0], SIZES[0])),
    ],
    ids=["static", "dynamic"],
)
def test_two_requests_over_one_denoiser(plan, sizes):
    pipe = tiny.wan21(layers=2)
    apply_plan(pipe, plan)
    pipes = [
        type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler)) for _ in sizes
    ]
    runs = [
        lambda own=own, size=size, seed=seed: tiny.generate(own, seed, **size)
        for seed, (own, size) in enumerate(zip(pipes, sizes, strict=True))
    ]
    alone = [run() for run in runs]
    assert not torch.equal(*(x.flatten() for x in alone))
    found = together(runs, pipe.transformer)
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    assert {row.reason for row in summary(pipe).layers} == {None}
    assert summary(pipe).layout is not None  # though no call was made in this thread


def arguments(height, width):
    torch.manual_seed(height)
    return {
        "hidden_states": torch.randn(1, 4, 3, height // 8, width // 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 10, 16),
    }


def test_two_asyncio_tasks_over_one_denoiser():
    """Each says where it is by ``cache_context``, in which the other's turn comes."""
    model = tiny.wan_transformer(1, layers=1)
    apply_plan(model, VARIED)

    async def request(size, name):
        outs = []
        for step in range(3):
            with model.cache_context(name, step_index=step, num_inference_steps=3):
                await asyncio.sleep(0)
                outs.append(model(**arguments(**size)).sample)
                await asyncio.sleep(0)
        return torch.stack(outs)

    async def both():
        return await asyncio.gather(request(SIZES[0], "cond"), request(SIZES[1], "uncond"))

    with torch.no_grad():
        found = asyncio.run(both())
        alone = [
            asyncio.run(request(size, name))
            for size, name in zip(SIZES, ("cond", "uncond"), strict=True)
        ]
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_module_that_shares_a_processor_is_not_taken_for_the_layer_of_another_thread():
    """While the attention of a layer is about to run in one thread, cross-attention runs in this
    one, through the same processor object."""
    model = tiny.wan_transformer(1, layers=1)
    block = model.blocks[0]
    block.attn2.processor = block.attn1.processor
    apply_plan(model, PLAN)
    query, text = torch.randn(1, 72, 64), torch.randn(1, 10, 64)
    seen = []

    def meanwhile(*_):
        own = threading.Thread(target=lambda: seen.append(block.attn2(query, text)))
        own.start()
        own.join()

    with torch.no_grad():
        expected = model(**arguments(96, 64)).sample
        right = block.attn2(query, text)
        handle = block.attn1.to_q.register_forward_pre_hook(meanwhile)
        found = model(**arguments(96, 64)).sample
        handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(seen[0], right)
    (row,) = summary(model).layers
    assert (row.sparse_calls, row.dense_calls, row.reason) == (2, 0, None)
