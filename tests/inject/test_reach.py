"""A plan reaches exactly the calls that it names: every attention call of a generation is compared
with the same module of an untouched copy, given the same inputs, in which torch's attention is
replaced by attention with a mask, written here."""

import copy
from collections import Counter

import pytest
import torch
from support import tiny
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Dense, Diagonal, MultiDiagonal, Neighborhood, Radial, Skip
from visattn.plan import Plan, Rule

pytestmark = pytest.mark.second

STEPS = 4
A = (Dense(), Diagonal(3), Neighborhood((1, 3, 3)), MultiDiagonal(2))
B = (Radial(0.2, rule="token"), Dense(), Dense(), Skip())
C = (Diagonal(9), Diagonal(1), Diagonal(20), Dense())


def plans(name):
    """Plans that tell apart all that a plan can tell apart, and who may run what by them."""
    _, one, two = tiny.paths(name)
    out = {
        "heads": Plan((Rule(A),)),
        "a layer": Plan((Rule(B, layer=one),)),
        "dense ends": Plan((Rule(A),), dense_layers=(0, -1), dense_steps=(1, 1)),
        "shares of the steps": Plan((Rule(C),), dense_steps=(0.3, 0.25)),
        "phases": Plan((Rule(A, phase=0), Rule(C, phase=1, layer=two)), phases=(0.5,)),
        "passes": Plan((Rule(A, pass_="cond"), Rule(B, pass_="uncond", layer=one))),
        "last rule wins": Plan((Rule(A), Rule(B, pass_="uncond"), Rule(C, layer=two, phase=1)),
                               phases=(0.25, 0.5)),
    }
    if name == "wan22":
        out["roles"] = Plan((Rule(A, role="transformer"), Rule(C, role="transformer_2", layer=two)))
    return out


def named(plan, role, layer, number, step, pass_):
    """What the heads of a call run: the definition, read from the docstring of Plan."""
    first, last = (n if isinstance(n, int) else -int(-n * STEPS // 1) for n in plan.dense_steps)
    dense = (Dense(),) * tiny.HEADS
    if number in [n % tiny.LAYERS for n in plan.dense_layers]:
        return dense
    if step < first or step >= STEPS - last:
        return dense
    phase = len([end for end in plan.phases if step / STEPS >= end])
    heads = dense
    for rule in plan.rules:
        if (
            rule.layer in ("any", layer)
            and rule.role in ("any", role)
            and rule.phase in (None, phase)
            and rule.pass_ in ("any", pass_)
        ):
            heads = rule.patterns
    return heads


class Masked(TorchFunctionMode):
    """torch's attention with a mask per head and part of the batch, in float64."""

    def __init__(self, parts, layout):
        super().__init__()
        index = torch.arange(layout.length)
        masks = [
            torch.stack([p.allows(index[:, None], index, layout) for p in heads]) for heads in parts
        ]
        self.mask = torch.stack(masks)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = [*args, *((kwargs or {}).get(n) for n in ("query", "key", "value")[len(args) :])]
        q, k, v = (x.double() for x in given[:3])
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = self.mask.repeat_interleave(len(q) // len(self.mask), 0)
        padding = (kwargs or {}).get("attn_mask")
        mask = mask if padding is None else mask & padding
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
        return (weights @ v).to(given[0].dtype)


class Record:
    """Every call of an attention module of a pipeline, with its role, layer, step and passes."""

    def __init__(self, pipe, name):
        self.calls, self.step, self.forwards = [], 0, 0
        self.batched = "cogvideox" in name
        own = pipe.scheduler.step

        def step(*args, **kwargs):
            self.step, self.forwards = self.step + 1, 0
            return own(*args, **kwargs)

        pipe.scheduler.step = step
        for role in ("transformer", "transformer_2"):
            model = getattr(pipe, role, None)
            if model is None:
                continue
            model.register_forward_hook(self.forward)
            for number in range(tiny.LAYERS):
                module = model.get_submodule(tiny.paths(name)[number])
                module.register_forward_hook(self.hook(role, number, name), with_kwargs=True)

    def forward(self, *_):
        self.forwards += 1

    def hook(self, role, number, name):
        def keep(module, args, kwargs, output):
            pass_ = ("uncond", "cond") if self.batched else (("cond", "uncond")[self.forwards],)
            where = role, tiny.paths(name)[number], number, self.step
            self.calls.append((*where, pass_, args, dict(kwargs), output))

        return keep


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


CASES = [(name, key) for name in tiny.PIPELINES for key in plans(name)]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_plan_reaches_the_calls_that_it_names_and_no_other(name, key):
    plan, layout = plans(name)[key], tiny.layout(name)
    pipe = tiny.PIPELINES[name]()
    untouched = copy.deepcopy(pipe)
    apply_plan(pipe, plan)
    record = Record(pipe, name)
    tiny.generate(pipe, steps=STEPS)
    forwards = STEPS * (1 if record.batched else 2)
    assert len(record.calls) == forwards * tiny.LAYERS
    seen = Counter()
    for role, layer, number, step, passes, args, kwargs, output in record.calls:
        parts = [named(plan, role, layer, number, step, pass_) for pass_ in passes]
        module = getattr(untouched, role).get_submodule(layer)
        dense = all(p == Dense() for heads in parts for p in heads)
        seen["dense" if dense else "sparse"] += 1
        if dense:
            with torch.no_grad():
                expected = tensors(module(*args, **kwargs))
            assert all(map(torch.equal, tensors(output), expected)), (layer, step, passes)
        else:
            with torch.no_grad(), Masked(parts, layout):
                expected = tensors(module(*args, **kwargs))
            for own, other in zip(tensors(output), expected, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert seen["sparse"]
    counted = {(row.role, row.layer): row for row in summary(pipe).layers}
    assert sum(row.sparse_calls for row in counted.values()) == seen["sparse"]
    left = sum(row.sparse_calls + row.dense_calls for row in counted.values())
    assert left <= forwards * tiny.LAYERS
    assert all(row.reason is None for row in counted.values())


def test_oracle_tells_a_wrong_head_from_the_right_one():
    """The comparison above can fail: with two heads exchanged it does."""
    pipe = tiny.wan21()
    untouched = copy.deepcopy(pipe)
    apply_plan(pipe, Plan((Rule(A),)))
    record = Record(pipe, "wan21")
    tiny.generate(pipe, steps=1)
    *_, args, kwargs, output = record.calls[1]
    module = untouched.transformer.get_submodule("blocks.1.attn1")
    wrong = (A[1], A[0], *A[2:])
    with torch.no_grad(), Masked([wrong], tiny.layout("wan21")):
        assert (output - module(*args, **kwargs)).abs().max() > 1e-4
    with torch.no_grad(), Masked([A], tiny.layout("wan21")):
        assert (output - module(*args, **kwargs)).abs().max() < 1e-6


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_backends_agree(name):
    pipe = tiny.PIPELINES[name]()
    plan = Plan((Rule(A),))
    out = []
    for backend in ("reference", "blockwise"):
        apply_plan(pipe, plan, backend=backend)
        out.append(tiny.generate(pipe, steps=2))
    assert (out[1] - out[0]).abs().max() < 1e-5
    remove_plan(pipe)
    assert (tiny.generate(pipe, steps=2) - out[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "hunyuanvideo"])
def test_kernel_agrees(name):
    """One call, which is much for the interpreter."""
    pipe = tiny.PIPELINES[name]()
    plan = Plan((Rule((Diagonal(3), Dense(), Dense(), Dense()), layer=tiny.paths(name)[1]),))
    options = {"steps": 1, "guidance_scale": 1.0, "negative_prompt": None}
    dense = tiny.generate(pipe, **options)
    out = []
    for backend in ("reference", "triton"):
        apply_plan(pipe, plan, backend=backend)
        out.append(tiny.generate(pipe, **options))
        assert summary(pipe).layers[0].sparse_calls == 1
    assert (out[1] - out[0]).abs().max() < 1e-5
    assert (dense - out[0]).abs().max() > 1e-4
