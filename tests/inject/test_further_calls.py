"""Attention calls that a module makes beside its own: those of image adapters."""

import logging

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from support import tiny, tiny_images

from visattn.inject import apply_plan, observe, remove_plan, summary
from visattn.patterns import Diagonal

WIDTH = tiny.HEADS * tiny.DIM
IMAGE = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))


def sd3_with_adapter(image=IMAGE):
    pipe = tiny_images.sd3()
    torch.manual_seed(0)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(WIDTH, 8, tiny.DIM, 16).eval())
    both = {"ip_hidden_states": image.repeat(2, 1, 1), "temb": torch.ones(2, 16)}
    return pipe, {"joint_attention_kwargs": both}


def flux_with_adapter(image=IMAGE):
    pipe = tiny_images.flux()
    torch.manual_seed(0)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(WIDTH, 8).eval())
    return pipe, {"joint_attention_kwargs": {"ip_hidden_states": [image]}, "guidance": False}


@pytest.mark.parametrize("make", [sd3_with_adapter, flux_with_adapter])
def test_call_of_an_adapter_is_not_that_of_the_layer(make, caplog):
    """It is not shown, not counted, and no layer is called dense for it."""
    pipe, options = make()
    dense = tiny_images.generate(pipe, **options)
    other = tiny_images.generate(pipe, **make(-IMAGE)[1])
    assert not torch.allclose(dense, other)  # it does something
    seen = []
    apply_plan(pipe, Diagonal(2), guard=False)
    with caplog.at_level(logging.WARNING, "visattn"), observe(pipe, seen.append):
        assert not torch.allclose(tiny_images.generate(pipe, **options), dense)
        layers = summary(pipe).layers
    assert {(row.sparse_calls, row.dense_calls, row.reason) for row in layers} == {(3, 0, None)}
    assert len(seen) == 3 * len(layers)
    assert {(call.q.shape[2], call.k.shape[2]) for call in seen} == {(seen[0].layout.length,) * 2}
    assert caplog.records == []
    apply_plan(pipe, Diagonal(1.0), guard=False)
    assert torch.allclose(tiny_images.generate(pipe, **options), dense, atol=1e-5)
    remove_plan(pipe)
    assert torch.equal(tiny_images.generate(pipe, **options), dense)


def test_call_of_an_adapter_in_compiled_blocks():
    torch._dynamo.reset()
    pipe, options = sd3_with_adapter()
    apply_plan(pipe, Diagonal(2), guard=False)
    expected = tiny_images.generate(pipe, steps=1, **options)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    found = tiny_images.generate(pipe, steps=1, **options)
    torch.testing.assert_close(found, expected)
    rows = summary(pipe).layers
    assert {(row.sparse_calls, row.dense_calls, row.reason) for row in rows} == {(2, 0, None)}
    torch._dynamo.reset()
