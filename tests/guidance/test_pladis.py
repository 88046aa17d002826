"""PLADIS: the sparse rules equal a bisection, and cross-attention the mix that is written out."""

import pytest
import torch
from support import tiny
from support.allocations import check_linear
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn.guidance import steer
from visattn.guidance.edits import pladis as module
from visattn.guidance.edits.pladis import PLADIS, entmax15, sparse_attention_of, sparsemax

RULES = {"entmax15": (entmax15, 0.5, 2), "sparsemax": (sparsemax, 1.0, 1)}


def bisected(logits, factor, power):
    """``max(factor z - t, 0) ** power`` that sums to 1, ``t`` by bisection in float64."""
    z = factor * logits.double()
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        much = (z - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) > 1
        low, high = torch.where(much, middle, low), torch.where(much, high, middle)
    return (z - low).clamp(min=0).pow(power)


class Mixed(TorchFunctionMode):
    """Cross-attention by maps, in float64."""

    def __init__(self, rule, weight):
        super().__init__()
        self.rule, self.weight = RULES[rule], weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] or (kwargs[n] for n in ("query", "key", "value"))
        if q.shape[2] == k.shape[2]:
            return func(*args, **(kwargs or {}))
        q, k, v = q.double(), k.double(), v.double()
        logits = q @ k.mT * q.shape[3] ** -0.5
        sparse = bisected(logits, *self.rule[1:])
        return ((self.weight * sparse + (1 - self.weight) * logits.softmax(-1)) @ v).float()


def cases():
    torch.manual_seed(0)
    yield torch.randn(3, 5, 40, dtype=torch.float64)
    yield 20 * torch.randn(2, 50, 512, dtype=torch.float64)
    yield 1e-3 * torch.randn(2, 512, dtype=torch.float64) + 30
    yield torch.zeros(2, 7, dtype=torch.float64)
    yield torch.tensor([[5.0]], dtype=torch.float64)
    yield torch.tensor([[0.0, -1.0, -2.0, -2.0, -1e30], [1e4, 1e4, 0, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize("name", RULES)
def test_rules_equal_a_bisection(name):
    rule, factor, power = RULES[name]
    for logits in cases():
        expected = bisected(logits, factor, power)
        torch.testing.assert_close(rule(logits), expected, atol=1e-12, rtol=1e-9)
        single = rule(logits.float())
        assert single.dtype == torch.float32
        expected = bisected(logits.float(), factor, power).float()
        torch.testing.assert_close(single, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_rows_sum_to_one_and_have_zeros(name):
    rule = RULES[name][0]
    logits = 4 * torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    weights = rule(logits)
    torch.testing.assert_close(weights.sum(-1), torch.ones(100))
    assert float((weights == 0).float().mean()) > 0.5
    assert float(weights.min()) >= 0
    assert bool((sparsemax(logits) > 0).sum() < (entmax15(logits) > 0).sum())


def test_weight_one_is_attention_of_a_few_keys(monkeypatch):
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 2, 3, 33, 8)
    q = q[:, :, :13]
    v = torch.eye(33).expand(2, 3, 33, 33)  # so that the attention is the map
    for chunk in (1 << 22, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        weights = sparse_attention_of(q, k, v, 0.35, "entmax15")
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 13))
        assert bool((weights == 0).any(-1).all())
        expected = bisected(q.double() @ k.double().mT * 0.35, 0.5, 2)
        torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rule", "weight"), [("entmax15", 2.0), ("sparsemax", 1.0)])
def test_generation_equals_the_maps(rule, weight):
    pipe = tiny.wan21()
    for block in pipe.transformer.blocks:  # so that some weights are 0
        block.attn2.norm_q.weight.data *= 8
    plain = tiny.generate(pipe)
    with Mixed(rule, weight):
        expected = tiny.generate(pipe)
    with steer(pipe, PLADIS(weight=weight, rule=rule)):
        found = tiny.generate(pipe)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) / scale < 1e-5
    assert float((found - plain).abs().max()) / scale > 1e-3


def test_weight_zero_changes_nothing_and_other_heads_stay():
    pipe = tiny.wan21()
    plain = tiny.generate(pipe)
    with steer(pipe, PLADIS(weight=0.0)):
        assert tiny.generate(pipe).equal(plain)
    with steer(pipe, PLADIS(heads={0: 0.0})):
        assert tiny.generate(pipe).equal(plain)
    with steer(pipe, PLADIS(passes="uncond")):
        assert tiny.generate(pipe, guidance_scale=3.0).equal(plain) is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": float("nan")}, r"weight=nan\) must be a finite number"),
        ({"rule": "softmax"}, r"rule='softmax'\) must be entmax15 or sparsemax"),
        ({"attention": "self"}, "it sorts the logits of every row"),
    ],
)
def test_bad_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        PLADIS(**options)


def test_what_pladis_cannot_do_is_told():
    with (
        pytest.raises(ValueError, match="text is part of the sequence"),
        steer(tiny.cogvideox(), PLADIS()),
    ):
        pass
    pipe = tiny.wan21()
    embeds = torch.zeros(1, 513, 16)
    with (
        pytest.raises(ValueError, match=r"at most 512 keys, and blocks\.0\.attn2 has 513"),
        steer(pipe, PLADIS()),
    ):
        tiny.generate(
            pipe,
            prompt=None,
            negative_prompt=None,
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
        )


def test_memory_is_linear():
    def make(tokens):
        q, k = torch.randn(1, 2, tokens, 16), torch.randn(1, 2, 64, 16)
        return lambda: sparse_attention_of(q, k, k, 0.25, "entmax15")

    check_linear(make, heads=2)
