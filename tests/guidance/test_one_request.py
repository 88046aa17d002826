"""Inside ``guide`` and ``steer`` one request at a time runs a denoiser: another one is refused
before it computes, and the one that runs is what it is alone."""

import asyncio
import copy
import functools
import threading

import pytest
import torch
from support import tiny

from visattn.guidance import NAG, SEG, CFGZeroStar, Perturb, guide, steer

SIZES = ({"height": 96, "width": 64}, {"height": 64, "width": 96})
REFUSED = "another thread or asyncio task runs the transformer now"


def guided(pipe):
    return guide(pipe, [SEG(layers=[1]), CFGZeroStar(zero_init=0)])


def steered(pipe):
    return steer(pipe, Perturb(layers=[1]))


def nag(pipe):
    return guide(pipe, NAG(negative_prompt="blue"))


def while_it_runs(first, second, model):
    """What ``first`` gives in a thread of its own, and ``second`` in this one, at a moment when the
    first is in its second call of a model."""
    inside, go_on, found, calls = threading.Event(), threading.Event(), [], []

    def stop(*_):
        if threading.current_thread() is own:
            calls.append(1)
            if len(calls) == 2:
                inside.set()
                assert go_on.wait(60)

    def work():
        try:
            found.append(first())
        except BaseException as error:
            found.append(error)
            inside.set()

    own = threading.Thread(target=work)
    handle = model.blocks[0].register_forward_pre_hook(stop)
    try:
        own.start()
        assert inside.wait(60)
        try:
            other = second()
        except RuntimeError as error:
            other = error
    finally:
        go_on.set()
        own.join()
        handle.remove()
    return found[0], other


def counted(model):
    """A list that grows with each block that a model runs in this thread."""
    here, calls = threading.current_thread(), []
    model.blocks[0].register_forward_pre_hook(
        lambda *_: calls.append(1) if threading.current_thread() is here else None
    )
    return calls


@pytest.mark.parametrize("block", [guided, steered, nag])
def test_second_pipeline_is_refused_and_the_first_is_unharmed(block):
    pipe = tiny.wan21(layers=2)
    other = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    with block(pipe):
        runs = [functools.partial(tiny.generate, pipe, n, **size) for n, size in enumerate(SIZES)]
        alone = [run() for run in runs]
        calls = counted(pipe.transformer)
        for second in (runs[1], functools.partial(tiny.generate, other, 1, **SIZES[1])):
            found, refused = while_it_runs(runs[0], second, pipe.transformer)
            assert isinstance(refused, RuntimeError) and REFUSED in str(refused), refused
            assert not calls  # before it computed anything
            assert torch.equal(found, alone[0])
        assert torch.equal(runs[1](), alone[1])


def arguments(height, width):
    torch.manual_seed(height)
    return {
        "hidden_states": torch.randn(1, 4, 3, height // 8, width // 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 10, 16),
    }


@pytest.mark.parametrize("block", [functools.partial(guide, guidances=SEG(layers=[1])), steered])
def test_second_call_of_a_denoiser_alone_is_refused(block):
    model = tiny.wan_transformer(1, layers=2)

    def run(size, times):
        with torch.no_grad():
            return [model(**arguments(**size)).sample for _ in range(times)][-1]

    with block(model):
        alone = [run(size, 1) for size in SIZES]
        found, refused = while_it_runs(lambda: run(SIZES[0], 2), lambda: run(SIZES[1], 1), model)
        assert isinstance(refused, RuntimeError) and REFUSED in str(refused), refused
        assert torch.equal(found, alone[0])
        assert torch.equal(run(SIZES[1], 1), alone[1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_request_that_was_ended_the_next_one_runs(error):
    """In another thread too."""
    pipe = tiny.wan21(layers=2)

    def end(*_):
        raise error

    found = []
    with guided(pipe):
        expected = tiny.generate(pipe)
        handle = pipe.transformer.blocks[1].register_forward_pre_hook(end)
        with pytest.raises(error):
            tiny.generate(pipe)
        handle.remove()
        own = threading.Thread(target=lambda: found.append(tiny.generate(pipe)))
        own.start()
        own.join()
    assert torch.equal(found[0], expected)


def test_edits_are_not_put_on_a_denoiser_that_runs_elsewhere():
    pipe = tiny.wan21(layers=2)
    with guided(pipe):
        alone = tiny.generate(pipe)

        def second():
            with steered(pipe):
                return "entered"

        found, refused = while_it_runs(lambda: tiny.generate(pipe), second, pipe.transformer)
    assert isinstance(refused, RuntimeError) and REFUSED in str(refused), refused
    assert torch.equal(found, alone)


def test_asyncio_tasks():
    """A pipeline in a thread of one task, and another task's call meanwhile; then calls of a
    denoiser by two tasks, one after the other, which do not meet."""
    pipe = tiny.wan21(layers=2)
    inside, go_on = threading.Event(), threading.Event()
    main = threading.current_thread()

    def stop(*_):
        if threading.current_thread() is not main:
            inside.set()
            assert go_on.wait(60)

    async def first():
        return await asyncio.to_thread(tiny.generate, pipe)

    async def second():
        await asyncio.to_thread(inside.wait, 60)
        try:
            return tiny.generate(pipe)
        finally:
            go_on.set()

    async def both():
        return await asyncio.gather(first(), second(), return_exceptions=True)

    with guided(pipe):
        alone = tiny.generate(pipe)
        handle = pipe.transformer.blocks[0].register_forward_pre_hook(stop)
        found, refused = asyncio.run(both())
        handle.remove()
        assert isinstance(refused, RuntimeError) and REFUSED in str(refused), refused
        assert torch.equal(found, alone)


def test_tasks_that_take_turns_do_not_mix_what_cfg_zero_keeps():
    """The conditional prediction that scales the unconditional one is that of the same task."""
    model = tiny.wan_transformer(1, layers=2)

    async def request(size):
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                await asyncio.sleep(0)
                own = arguments(**size)
                out = model(**own).sample
                await asyncio.sleep(0)
        return out

    async def both():
        return await asyncio.gather(*map(request, (SIZES[0], {"height": 96, "width": 96})))

    with torch.no_grad(), guide(model, CFGZeroStar(zero_init=0)):
        found = asyncio.run(both())
        alone = [asyncio.run(request(s)) for s in (SIZES[0], {"height": 96, "width": 96})]
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_from_pipe_inside_guide_is_refused():
    """diffusers would leave the denoiser out."""
    pipe = tiny.wan21(layers=2)
    with guided(pipe):
        tiny.generate(pipe)
        assert pipe.components["transformer"] is pipe.transformer
        with pytest.raises(ValueError, match="call from_pipe before guide, or after it"):
            type(pipe).from_pipe(pipe)
    with steered(pipe):
        other = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        tiny.generate(pipe)
    assert other.transformer is pipe.transformer
