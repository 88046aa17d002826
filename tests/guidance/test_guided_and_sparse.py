"""Guidance and edits under a sparse plan: they do there what they do without one, and the plan's
error grows by what the combination of the passes multiplies it with, and no more."""

import functools
import math

import pytest
import torch
from support import tiny
from support.guided_pipelines import generate, pipeline

import visattn
from visattn.guidance import SEG, SLG, Guidance, RegionMask, SoftPAG
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule

W = 3.0
# with errors that are small against what the guidances change, about a tenth of pairs left out
PLANS = {
    "wan21": Plan((Rule(Diagonal(50)),)),
    "cogvideox": Plan((Rule(Diagonal(50)),)),
    "flux": Plan((Rule(Diagonal(15)),)),
    "sd3": Plan((Rule(Diagonal(15)),)),
}
GUIDANCES = {
    "SoftPAG": SoftPAG(scale=W),
    "SEG": SEG(scale=W),
    "SLG": SLG(blocks=1, start=0, stop=1.0, scale=W),
}
REGIONS = 3
kinds = pytest.mark.parametrize("kind", PLANS)
guided = pytest.mark.parametrize(
    ("kind", "name"),
    [(k, name) for k in PLANS for name in GUIDANCES if name != "SLG" or k in tiny.PIPELINES],
)


def regions(state):
    """Every third token sees itself and its like."""
    return 1 << (torch.arange(state.q.shape[2]) % REGIONS)


MASK = RegionMask(q_bits=regions)


@functools.cache
def both(kind, steps, own=(), guided=True):
    """Latents without the plan of a kind and with it; ``own``: a guidance, or edits."""
    pipe = pipeline(kind)
    enter = visattn.guide if isinstance(own, Guidance) else visattn.steer
    with enter(pipe, own):
        dense = generate(pipe, steps, guided)
        with visattn.sparse(pipe, PLANS[kind]):
            return dense, generate(pipe, steps, guided)


def check_kept(dense, sparse, dense_guided, sparse_guided):
    """The effect of a guidance is kept under a plan: without it the result would be twice as far
    off, and it points where the dense one does."""
    dropped = (sparse - dense_guided).norm()
    assert (sparse_guided - dense_guided).norm() < 0.5 * dropped
    effects = (sparse_guided - sparse).flatten(), (dense_guided - dense).flatten()
    assert torch.cosine_similarity(*effects, dim=0) > 0.9


@guided
def test_error_of_one_step_is_that_of_its_passes(kind, name):
    """The first step is linear in the predictions, ``u + g (c - u) + w (c - p)``: to the error of
    the plan without the guidance comes ``w`` times that of ``c`` less that of ``p``, which are
    those of pipelines without classifier-free guidance, with the guidance's edits and without."""
    own = GUIDANCES[name]
    dense, sparse = both(kind, 1)
    c, sparse_c = both(kind, 1, guided=False)
    p, sparse_p = both(kind, 1, tuple(own.edits()), guided=False)
    expected = sparse - dense + W * ((sparse_c - c) - (sparse_p - p))
    dense_guided, sparse_guided = both(kind, 1, own)
    largest = dense_guided.abs().max()
    assert (sparse_guided - dense_guided - expected).abs().max() < 2e-6 * largest
    assert expected.abs().max() > 1e-3 * largest


@guided
def test_guided_sparse_result_is_within_the_error_of_its_passes(kind, name):
    """Over more steps the errors add up to at most ``|s - d| + w (|e_c| + |e_p|)``, ``e`` being
    those of the two passes by themselves. A twentieth is for the later steps, whose passes have
    other latents.

    That is up to ``1 + 2 w`` times the error of the plan without the guidance. It would be ``(g + 2
    w) / g`` if that were ``g e``; but classifier-free guidance has ``g e_c - (g - 1) e_u``, in
    which what both passes have in common counts once, and ``p``'s error need not cancel ``c``'s:
    SoftPAG of all heads, which has no attention left in ``p``, reaches ``1 + w``."""
    dense, sparse = both(kind, 2)
    dense_guided, sparse_guided = both(kind, 2, GUIDANCES[name])
    check_kept(dense, sparse, dense_guided, sparse_guided)
    bound = (sparse - dense).norm()
    for edits in ((), tuple(GUIDANCES[name].edits())):
        plain, other = both(kind, 2, edits, guided=False)
        bound += W * (other - plain).norm()
    assert 0 < (sparse_guided - dense_guided).norm() < 1.05 * bound


@kinds
def test_masked_sparse_result_is_within_the_error_of_fewer_keys(kind):
    """Of ``m`` regions each query has a share ``1 / m`` of the keys, of which the plan drops the
    same share; the mean of as many fewer values is off by ``sqrt(m)`` times as much, were they
    independent and all weights alike."""
    dense, sparse = both(kind, 2)
    dense_masked, sparse_masked = both(kind, 2, (MASK,))
    check_kept(dense, sparse, dense_masked, sparse_masked)
    bound = math.sqrt(REGIONS) * (sparse - dense).norm()
    assert 0 < (sparse_masked - dense_masked).norm() < bound
