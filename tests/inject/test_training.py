"""Denoisers are trained with a plan on them."""

import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig
from support import tiny, tiny_images
from support.planned import KINDS, PLAN, VARIED
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

from visattn.inject import apply_plan, remove_plan, sparse, summary


def example(kind):
    torch.manual_seed(1)
    if kind == "wan21":
        return {
            "hidden_states": torch.randn(2, 4, 3, 12, 8),
            "timestep": torch.tensor([500, 100]),
            "encoder_hidden_states": torch.randn(2, 10, 16),
        }
    pipe = tiny.PIPELINES[kind]()
    return {
        "hidden_states": torch.randn(2, 3, 4, 12, 8),
        "timestep": torch.tensor([500, 100]),
        "encoder_hidden_states": torch.randn(2, 10, 16),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(
            96, 64, 3, torch.device("cpu")
        ),
    }


def gradients(kind, plan, backend="auto", checkpointing=False):
    model = tiny.PIPELINES[kind]().transformer.double().train()
    batch = {k: v.double() if k.endswith("states") else v for k, v in example(kind).items()}
    if checkpointing:
        model.enable_gradient_checkpointing()
    if plan is not None:
        apply_plan(model, plan, backend=backend)
    out = model(**batch, return_dict=False)[0]
    (out**2).mean().backward()
    if plan is not None:
        rows = summary(model).layers
        assert all(row.sparse_calls == 1 + checkpointing and row.reason is None for row in rows)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(kind, checkpointing):
    found = gradients(kind, PLAN, checkpointing=checkpointing)
    expected = gradients(kind, PLAN, backend="reference")
    assert {k for k, v in found.items() if v is None} == {
        k for k, v in expected.items() if v is None
    }
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    dense = gradients(kind, None)
    name = next(n for n in dense if n.endswith("0.attn1.to_q.weight"))
    assert not torch.allclose(dense[name], found[name])


def test_lora_is_trained_with_a_plan():
    model = tiny.wan21().transformer.train()
    apply_plan(model, PLAN)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        loss = (model(**example("wan21"), return_dict=False)[0] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(row.sparse_calls == 3 for row in summary(model).layers)


def at_size(kind, frames, height, width):
    """Arguments of a call, of ``height`` times ``width`` patches."""
    torch.manual_seed(width)
    if kind == "wan21":
        return {
            "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 10, 16),
        }
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros(height, width), rows, columns], -1).reshape(-1, 3)
    return {
        "hidden_states": torch.randn(1, height * width, 16),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 16),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
    }


def gradient_of_two(kind, reentrant, plan=PLAN):
    """The gradient of two calls at once, of a landscape and a portrait of equally many tokens."""
    if kind == "wan21":
        model = tiny.wan_transformer(1, layers=1).train()
    else:
        model = tiny_images.flux().transformer.train()
    apply_plan(model, plan, guard=False)
    if reentrant is not None:
        model.enable_gradient_checkpointing(
            functools.partial(checkpoint_module, use_reentrant=reentrant)
        )
    outs = []
    for sizes in ((3, 6, 4), (3, 4, 6)):
        own = at_size(kind, *sizes)
        own["hidden_states"].requires_grad_()  # or reentrant checkpointing has no gradient
        outs.append(model(**own, return_dict=False)[0])
    sum((out**2).mean() for out in outs).backward()
    assert all(row.reason is None for row in summary(model).layers)
    return {name: own.grad for name, own in model.named_parameters()}


def checkpoint_module(module, *args, use_reentrant):
    return checkpoint(module.__call__, *args, use_reentrant=use_reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", ["wan21", "flux"])
def test_blocks_run_again_at_the_size_of_their_own_call(kind, reentrant):
    found, expected = gradient_of_two(kind, reentrant), gradient_of_two(kind, None)
    assert {name for name, own in found.items() if own is None} == {
        name for name, own in expected.items() if own is None
    }
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_blocks_run_again_at_the_step_and_pass_of_their_own_call():
    """What a plan runs at another step is another gradient."""
    own = at_size("wan21", 3, 6, 4)
    gradients = []
    for checkpointing in (False, True):
        model = tiny.wan_transformer(1, layers=1).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        apply_plan(model, VARIED)
        outs = []
        for step, name in ((0, "cond"), (1, "uncond")):
            with model.cache_context(name, step_index=step, num_inference_steps=2):
                outs.append(model(**own, return_dict=False)[0])
        sum((out**2).mean() for out in outs).backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_backward_after_the_plan_is_taken_off_is_refused(reentrant):
    model = tiny.wan_transformer(1, layers=1).train()
    model.enable_gradient_checkpointing(
        functools.partial(checkpoint_module, use_reentrant=reentrant)
    )
    own = at_size("wan21", 3, 6, 4)
    own["hidden_states"].requires_grad_()
    with sparse(model, PLAN):
        loss = model(**own, return_dict=False)[0].mean()
    with pytest.raises(RuntimeError, match="call backward before the plan is removed"):
        loss.backward()
    model(**own, return_dict=False)[0].mean().backward()  # without a plan as ever


@pytest.mark.parametrize("how", ["wrapper", "other thread"])
def test_blocks_that_torch_wraps_run_again_in_their_own_call(how):
    """As FSDP wraps them; a backward on a GPU runs them in a thread of its own."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny.wan_transformer(1, layers=1).train()
        apply_plan(model, PLAN, guard=False)
        if checkpointing:
            apply_activation_checkpointing(model, check_fn=_is_block)
        outs = [model(**at_size("wan21", *size))[0] for size in ((3, 6, 4), (3, 4, 6))]
        loss = sum((out**2).mean() for out in outs)
        if how == "wrapper":
            loss.backward()
        else:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        assert b"visattn" not in pickle.dumps(model)
        remove_plan(model)
        assert not any("visattn" in type(x).__module__ for x in vars(model.blocks[0]).values())
        gradients.append([own.grad for own in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_blocks_that_run_again_unannounced_are_refused():
    model = tiny.wan_transformer(1, layers=1).train()
    apply_plan(model, PLAN, guard=False)
    block = model.blocks[0]
    model.blocks[0] = _Again(block)
    loss = model(**at_size("wan21", 3, 6, 4))[0].mean()
    with pytest.raises(RuntimeError, match="use enable_gradient_checkpointing"):
        loss.backward()


class _Again(torch.nn.Module):
    """Code of a user's own that runs a block again."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return checkpoint(self.block, *args, use_reentrant=False)


def _is_block(module):
    return type(module).__name__ == "WanTransformerBlock"
