"""Dense attention with its normaliser against the map written out, and its gradients."""

import pytest
import torch
from support.allocations import check_linear

from visattn.attention.dense_attention import dense_with_lse


def tensors(rows=37, keys=53, dim=16, dtype=torch.float64, values=None, batch=2, heads=3):
    random = torch.Generator().manual_seed(0)
    sizes = ((rows, dim), (keys, dim), (keys, values or dim))
    return [torch.randn(batch, heads, *s, generator=random).to(dtype) for s in sizes]


@pytest.mark.parametrize("values", [None, 5])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_output_and_normaliser(dtype, bound, values):
    q, k, v = tensors(dtype=dtype, values=values)
    out, lse = dense_with_lse(q, k, v, 0.3)
    logits = q.double() @ k.double().mT * 0.3
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out - logits.softmax(-1) @ v.double()).abs().max() < bound
    assert (lse - logits.logsumexp(-1)).abs().max() < max(bound, 1e-6)


def test_gradients_of_both():
    q, k, v = (x[:1, :1, :6].requires_grad_() for x in tensors(6, 6, 4))
    assert torch.autograd.gradcheck(lambda *x: dense_with_lse(*x, 0.3), (q, k, v))


def test_without_keys_there_is_nothing():
    q, k, v = tensors(keys=0)
    out, lse = dense_with_lse(q, k, v, 0.3)
    assert out.equal(torch.zeros(2, 3, 37, 16).double())
    assert (lse == -torch.inf).all()


@pytest.mark.second
def test_memory_of_a_backward_pass_is_linear():
    def make(tokens):
        made = tensors(tokens, tokens, 8, torch.float32, batch=1, heads=1)
        q, k, v = (x.requires_grad_() for x in made)

        def run():
            out, lse = dense_with_lse(q, k, v, 0.3)
            (out.sum() + lse.sum()).backward()

        return run

    check_linear(make)
