"""Denoisers are trained with a plan on them."""

import pytest
import tiny
import torch
from peft import LoraConfig
from planned import KINDS, PLAN

from visattn.inject import apply_plan, summary


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
