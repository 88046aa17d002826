"""After ``sparse``, ``guide`` and ``steer`` a pipeline is what it was, wherever it was interrupted;
and many of them one after the other leave nothing behind."""

import contextlib
import gc
import multiprocessing
import weakref

import pytest
import torch
from support import tiny
from support.planned import PLAN, VARIED, Stop, traces, usual

from visattn.guidance import SEG, SkipBlock, SoftPAG, guide, steer
from visattn.inject import apply_plan, observe, remove_plan, sparse

pytestmark = pytest.mark.second

EDITS = [SkipBlock(blocks=(1,), passes="uncond", what="attention")]
WAYS = {
    "sparse": lambda pipe: sparse(pipe, VARIED),
    "guide": lambda pipe: guide(pipe, [SEG(), SoftPAG(strength=0.5)]),
    "steer": lambda pipe: steer(pipe, EDITS),
}
POINTS = ("before the denoiser", "in a block", "in attention", "after attention", "after a call")


def raising(error):
    def hook(*_):
        raise error

    return hook


@contextlib.contextmanager
def failing(model, point, error):
    """Inside, an error is raised at a point of each call of a denoiser."""
    module = {
        "before the denoiser": model,
        "in a block": model.blocks[1].norm2,
        "in attention": model.blocks[1].attn1.to_k,
        "after attention": model.blocks[1].attn1.to_out[0],
        "after a call": model,
    }[point]
    late = point == "after a call"
    register = module.register_forward_hook if late else module.register_forward_pre_hook
    handle = register(raising(error))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_at_every_point(way):
    pipe = tiny.wan21(layers=2)
    dense = tiny.generate(pipe, steps=2)
    clean = traces(pipe)
    for number, point in enumerate(POINTS):
        error = (Stop, KeyboardInterrupt)[number % 2]
        with pytest.raises(error), WAYS[way](pipe), failing(pipe.transformer, point, error):
            tiny.generate(pipe, steps=2)
        assert traces(pipe) == clean, point
    with pytest.raises(KeyboardInterrupt), WAYS[way](pipe):
        tiny.generate(pipe, steps=2, callback_on_step_end=raising(KeyboardInterrupt))
    assert traces(pipe) == clean

    def interrupt(own, step, timestep, tensors):
        own._interrupt = True  # as diffusers' documentation shows
        return tensors

    with WAYS[way](pipe):
        tiny.generate(pipe, steps=3, callback_on_step_end=interrupt)
    assert traces(pipe) == clean

    def generations():
        with WAYS[way](pipe):
            while True:
                yield tiny.generate(pipe, steps=2)

    generator = generations()
    assert not torch.equal(next(generator), dense)
    generator.close()
    assert traces(pipe) == clean
    assert torch.equal(tiny.generate(pipe, steps=2), dense)


def call(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 3, 12, 8),
            timestep=torch.tensor([3]),
            encoder_hidden_states=torch.randn(1, 10, 16),
        ).sample


def test_two_hundred_plans_leave_nothing():
    model = tiny.wan_transformer(1, layers=1)
    counts = []
    for number in range(220):
        apply_plan(model, PLAN)
        call(model)
        remove_plan(model)
        if number % 100 == 19:
            gc.collect()
            every = gc.get_objects()
            counts.append((len(every), sum(isinstance(one, torch.Tensor) for one in every)))
            del every
    # the list of counts itself grows
    assert max(count for count, _ in counts) - counts[0][0] <= 20
    assert {tensors for _, tensors in counts} == {counts[0][1]}


@pytest.mark.parametrize("way", ["plan", "observed", "removed"])
def test_denoiser_is_freed_with_its_last_user(way):
    """Without the garbage collector, which big models on a GPU would wait for. What diffusers keeps
    for ``cache_context`` refers to the model in a circle; these calls have none."""
    model = tiny.wan_transformer(1, layers=2)
    gc.collect()
    gc.disable()
    try:
        apply_plan(model, PLAN)
        with observe(model, lambda _: None) if way == "observed" else contextlib.nullcontext():
            call(model)
        if way == "removed":
            remove_plan(model)
        attachment = model.__dict__.get("_visattn")
        found = [weakref.ref(model)]
        if attachment is not None:
            found += [weakref.ref(one) for one in (attachment, *attachment.layers)]
        del model, attachment
        assert [one() for one in found] == [None] * len(found)
    finally:
        gc.enable()


def in_a_fork(pipe, sender):
    torch.set_num_threads(1)
    sender.send(tiny.generate(pipe).tolist())
    remove_plan(pipe)
    sender.send(tiny.generate(pipe).tolist())


def test_forked_process_has_the_plan():
    pipe = tiny.wan21()
    apply_plan(pipe, VARIED)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_a_fork, args=(pipe, sender))
    process.start()
    assert receiver.poll(120)
    assert torch.equal(torch.tensor(receiver.recv()), usual("wan21", VARIED))
    assert torch.equal(torch.tensor(receiver.recv()), usual("wan21", None))
    process.join()
    assert process.exitcode == 0
    assert torch.equal(tiny.generate(pipe), usual("wan21", VARIED))
