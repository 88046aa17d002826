"""Text columns of the attention map and their gradient: the dense map says what they are."""

import pytest
import torch
from support.allocations import check_linear, recorded

from visattn.guidance.edits import map_columns as module
from visattn.guidance.edits.map_columns import columns_by_lse, token_columns

FACTOR = 0.3
KEYS = torch.tensor([1, 4, 7])
GROUPS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
WEIGHTS = torch.tensor([0.7, 0.3])


def dense(q, k, keys=KEYS, groups=GROUPS, weights=WEIGHTS):
    """The same from the whole map, float64."""
    share = (q.double() @ k.double().mT * FACTOR).softmax(-1)
    mean = (share * weights.double()[:, None, None]).sum(1)
    return mean[..., keys] @ groups.double()


def tensors(queries=13, keys=29, dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(2, 2, queries, dim, dtype=torch.float64)
    k = torch.randn(2, 2, keys, dim, dtype=torch.float64)
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()


@pytest.fixture
def chunked(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 1 << 8)


def test_columns_equal_those_of_the_dense_map(chunked):
    q, k = tensors()
    own = token_columns(q, k, KEYS, GROUPS, WEIGHTS, FACTOR)
    torch.testing.assert_close(own, dense(q, k), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_inputs_and_never_logits(dtype):
    q, k = tensors(64, 200, 64, dtype=dtype)
    own = token_columns(q, k, KEYS, GROUPS, WEIGHTS, FACTOR)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), dense(q, k), atol=1e-7, rtol=1e-4)


def test_gradient_passes_gradcheck(chunked):
    q, k = tensors(5, 9, 3)
    assert torch.autograd.gradcheck(
        lambda q, k: token_columns(q, k, KEYS, GROUPS, WEIGHTS, FACTOR), (q, k)
    )


def test_gradient_equals_autograd_through_the_dense_map(chunked):
    q, k = tensors(40, 60)
    towards = torch.randn(2, 40, 3, dtype=torch.float64)
    own = torch.autograd.grad(token_columns(q, k, KEYS, GROUPS, WEIGHTS, FACTOR), (q, k), towards)
    other = torch.autograd.grad(dense(q, k), (q, k), towards)
    for mine, its in zip(own, other, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-14, rtol=1e-10)


def test_gradient_of_bfloat16_accumulates_in_float32():
    q, k = tensors(64, 300, 32, dtype=torch.bfloat16)
    towards = torch.randn(2, 64, 3)
    own = torch.autograd.grad(token_columns(q, k, KEYS, GROUPS, WEIGHTS, FACTOR), (q, k), towards)
    wide_q, wide_k = (x.detach().double().requires_grad_() for x in (q, k))
    other = torch.autograd.grad(dense(wide_q, wide_k), (wide_q, wide_k), towards.double())
    for mine, its in zip(own, other, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - its).norm() <= 3e-3 * its.norm()  # rounded once, at the end


def test_keys_that_need_no_gradient_get_none():
    q, k = tensors()
    found = token_columns(q, k.detach(), KEYS, GROUPS, WEIGHTS, FACTOR)
    (own,) = torch.autograd.grad(found.sum(), q)
    (other,) = torch.autograd.grad(dense(q, k).sum(), q)
    torch.testing.assert_close(own, other)


def test_a_sparse_normaliser_inflates_columns_by_one_over_the_kept_mass():
    q, k = (x.detach() for x in tensors())
    logits = q @ k.mT * FACTOR
    kept = torch.arange(29) % 4 != 2  # the tokens are among the kept
    sparse = logits.masked_fill(~kept, -torch.inf).logsumexp(-1)
    mass = (logits.softmax(-1) * kept).sum(-1)
    one = torch.tensor([1.0, 0.0])
    own = columns_by_lse(q, k, sparse, KEYS, GROUPS, one, FACTOR)
    torch.testing.assert_close(own * mass[:, 0, :, None], dense(q, k, weights=one))


def test_memory_is_linear_forward_and_backward():
    def make(tokens):
        torch.manual_seed(0)
        q = torch.randn(1, 1, tokens, 8, requires_grad=True)
        k = torch.randn(1, 1, tokens, 8, requires_grad=True)
        weights, groups = torch.ones(1), torch.eye(3)

        def run():
            token_columns(q, k, KEYS, groups, weights, FACTOR).sum().backward()

        return run

    peaks = check_linear(make)
    assert peaks[-1] < 8192**2 * 4  # the float32 map of one head


def test_the_recorder_sees_a_map():
    q, k = (torch.randn(1, 1, 512, 8) for _ in range(2))
    with recorded() as found:
        (q @ k.mT).softmax(-1).sum()
    assert found.largest == 512**2 * 4
    assert found.peak >= 2 * found.largest
