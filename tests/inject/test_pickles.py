"""What has a plan is pickled without it: what is read computes what it would without us."""

import io
import multiprocessing
import pickle

import pytest
import torch
from support import tiny
from support.planned import PLAN, VARIED, traces, usual

from visattn.guidance import SEG, SkipBlock, guide, steer
from visattn.inject import apply_plan, summary


def stock(pipe, model):
    """The classes of a pipeline with a denoiser, and their attributes; and what it gives."""
    pipe.transformer = model
    seen = {key: (value[0], set(value[1])) for key, value in traces(pipe).items()}
    for key, (_, names) in seen.items():
        if key[-1] == "processor":  # which may have the value of the class as its own
            names.discard("_attention_backend")
    return seen, tiny.generate(pipe)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_denoiser_is_pickled_without_its_plan(kind, way, caplog):
    pipe, other = tiny.PIPELINES[kind](), tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    sparse = tiny.generate(pipe)
    if way == "pickle":
        data = pickle.dumps(pipe.transformer)
        read = pickle.loads(data)
    else:
        buffer = io.BytesIO()
        torch.save(pipe.transformer, buffer)
        data = buffer.getvalue()
        read = torch.load(io.BytesIO(data), weights_only=False)
    assert b"visattn" not in data
    assert any("the pickle has no plan" in own.message for own in caplog.records)
    tiny.generate(other)  # so that its tokenizer has been called
    expected = stock(other, other.transformer)[0]
    seen, out = stock(other, read)
    assert seen == expected
    # read weights lie elsewhere in memory, so that other kernels may run on the CPU
    torch.testing.assert_close(out, usual(kind, None))
    assert torch.equal(tiny.generate(pipe), sparse)  # which has its plan still
    apply_plan(other, VARIED)
    torch.testing.assert_close(tiny.generate(other), sparse)


def test_guided_and_steered_pipeline_is_pickled_without():
    pipe = tiny.wan21()
    dense = tiny.generate(pipe)
    apply_plan(pipe, PLAN)
    with guide(pipe, SEG()), steer(pipe.transformer, [SkipBlock(blocks=(1,))]):
        tiny.generate(pipe)
        data = pickle.dumps(pipe.transformer)
    assert b"visattn" not in data
    other = tiny.wan21()
    other.transformer = pickle.loads(data)
    torch.testing.assert_close(tiny.generate(other), dense)


@pytest.mark.second
def test_denoiser_is_sent_to_another_process():
    """A real one, as servers start them; it takes long as it imports diffusers."""
    model = tiny.wan_transformer(1, layers=1)
    apply_plan(model, PLAN)
    process = multiprocessing.get_context("spawn").Process(target=summary, args=(model,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
