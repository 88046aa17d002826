"""What dynamic patterns remember: kept choices, guards, skip lists, cached LSEs, warm starts."""

from __future__ import annotations

import math

import pytest
import torch
from support.selectors_oracle import LAYOUTS, SCALE, lengths, small, tensors

from visattn import Grid, TokenLayout
from visattn.attention.dispatch import execute
from visattn.attention.spec import AttentionSpec, Choice
from visattn.patterns import Diagonal
from visattn.selectors import (
    ClusterBlocks,
    Hashing,
    Jenga,
    Memory,
    Pyramid,
    Rectified,
    Reuse,
    Selector,
    SkipList,
    TopBlocks,
)
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.largest_logits import largest_logits
from visattn.selectors.audit import audit, audited_rows
from visattn.selectors.methods.across_steps.reuse import raised
from visattn.selectors.methods.per_head_blocks.cluster_blocks import kmeans
from visattn.selectors.stages.history import SelectorState

TOP = TopBlocks(0.3, block=8)
LINE = TokenLayout(Grid(2, 3, 4))


def draws(seed: int, layout: TokenLayout = LINE, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, layout.length, 4)
    return tuple(size * torch.randn(shape, generator=generator) for _ in range(3))


def run(pattern: Selector, steps: int, moved: tuple[int, ...] = ()) -> list[int]:
    """At which steps a new choice is made; keys move at the steps ``moved``."""
    memory, made = Memory(), []
    seed = 0
    for step in range(steps):
        seed += step in moved
        memory.begin(step, steps)
        before = memory.made
        memory.choose(pattern, *draws(seed), LINE, 0.5)
        made += [step] * (memory.made - before)
    return made


def test_when_choices_are_made() -> None:
    top = TopBlocks(2, block=4)
    assert run(top, 4) == [0, 1, 2, 3]
    assert run(Reuse(top, 3), 8) == [0, 3, 6]
    assert run(Reuse(top, at=(0.25, 0.5)), 8) == [0, 2, 4]
    assert run(Reuse(top, 100, drift=0.5), 8, moved=(3, 6)) == [0, 3, 6]
    assert run(Reuse(top, 4, drift=0.5), 8, moved=(3,)) == [0, 3, 7]


def test_a_step_that_is_not_known_chooses_anew() -> None:
    memory = Memory()
    for _ in range(3):
        memory.begin(None, None)
        memory.choose(Reuse(TopBlocks(2, block=4), 9), *draws(0), LINE, 0.5)
    assert (memory.made, memory.reused) == (3, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"at": (0.5, 0.2)}, "increasing"),
        ({"at": 0.5}, "at=0.5"),
        ({"drift": 0.0}, "drift=0.0"),
        ({"guard": 0.0}, "guard=0.0"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_wrong_ways_of_keeping_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        Reuse(TOP, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="selector="):
        Reuse(Diagonal(3))  # type: ignore[arg-type]
    for pattern in (Rectified(), SkipList()):
        with pytest.raises(ValueError, match="use it without reuse"):
            Reuse(pattern)
    with pytest.raises(ValueError, match="has none"):
        Reuse(Hashing(), guard=0.1)


# ---- the audit and its guard


def test_audit_is_that_of_dense_attention() -> None:
    layout = LAYOUTS["video"]
    q, k, v = (x.float() for x in tensors(layout))
    texts = lengths(layout)
    selection = TOP.select(q, k, v, layout, SCALE)
    out, lse = attend(q, k, v, selection, layout, texts, SCALE)
    at = audited_rows(layout, 12, 3, q.device)
    assert len(at.unique()) == 12 and int(at.max()) < 90  # of the grid, not of the text
    assert not torch.equal(at, audited_rows(layout, 12, 4, q.device))
    found = audit(q, k, v, out, lse, layout, texts, SCALE, 12, 3)
    everything = TopBlocks(1.0, block=8).select(q, k, v, layout, SCALE)
    exact, full = attend(q, k, v, everything, layout, texts, SCALE)
    error = (out - exact)[:, :, at].abs().sum(-1) / exact[:, :, at].abs().sum(-1)
    assert torch.allclose(found.error, error, atol=1e-5)
    assert torch.allclose(found.dropped, 1 - (lse - full)[:, :, at].exp(), atol=1e-5)
    none = audit(q, k, v, exact, full, layout, texts, SCALE, 12)
    assert float(none.error.max()) < 1e-5 and float(none.dropped.max()) < 1e-5
    assert bool(audit(q, k, v, out, None, layout, texts, SCALE, 12).dropped.isnan().all())


def steps_of(pattern: Selector, steps: int, size: float = 1.0) -> tuple[Memory, list[float]]:
    """Run a pattern for some steps; its memory, and what it executed at each."""
    memory, executed = Memory(), []
    spec = AttentionSpec((pattern, pattern), LINE, scale=1.0, choice=Choice("blockwise", "a test"))
    for step in range(steps):
        memory.begin(step, steps)
        execute(*draws(0, LINE, size), spec, memory)
        executed.append(float(memory.density[pattern]))
    return memory, executed


def test_guard_raises_the_budget_until_the_error_is_allowed() -> None:
    pattern = Reuse(TopBlocks(1, block=4), every=2, guard=0.3, rows=24)
    memory, executed = steps_of(pattern, 12)
    assert memory.notches[pattern] >= 2
    assert executed == sorted(executed) and executed[-1] > 2 * executed[0]
    loose = Reuse(TopBlocks(5, block=4), every=4, guard=0.9)
    memory, executed = steps_of(loose, 12)
    assert not memory.notches and memory.made == 3


def test_guard_that_cannot_be_met_stops_at_the_most() -> None:
    pattern = Reuse(TopBlocks(2, mass=0.5, block=4), every=3, guard=1e-9)
    memory, executed = steps_of(pattern, 60)
    assert memory.notches[pattern] == 16 and executed[-1] == executed[-2]
    assert memory.reused > 20


def test_raised_budgets() -> None:
    assert raised(TopBlocks(3, mass=0.5), 2) == TopBlocks(5, mass=0.875)
    assert raised(TopBlocks(0.4), 1) == TopBlocks(0.5)
    assert raised(Jenga(0.6, 0.9), 1) == Jenga(0.8, 1.0)
    assert raised(Pyramid((0.4, 0.5, 0.6, 0.9)), 1).ends == (0.5, 0.625, 0.75, 1.0)  # type: ignore[attr-defined]
    hashing = Hashing()
    assert raised(hashing, 1) == hashing


# ---- skip lists


def test_skip_list_is_that_of_its_definition() -> None:
    """Densely at two steps; then what no query had a key of some mass in, ever, is left out."""
    layout = TokenLayout(Grid(3, 4, 5), text_after=3)
    pattern = SkipList(0.02, block=7, order="raster")
    memory = Memory()
    blocks = [list(range(n, min(n + 7, 60))) for n in range(0, 60, 7)] + [[60, 61, 62]]
    skipped: set[tuple[int, int, int]] = set()
    before: torch.Tensor | None = None
    choice = Choice("blockwise", "a test")
    spec = AttentionSpec((pattern, pattern), layout, scale=0.7, return_lse=True, choice=choice)
    left_out = []
    for step in range(5):
        q, k, v = draws(0, layout, 1.5)
        q = q + 0.2 * draws(step, layout)[0]
        memory.begin(step, 5)
        out, lse = execute(q, k, v, spec, memory)
        logits = q @ k.mT * 0.7
        for h in range(2):
            for i, rows in enumerate(blocks):
                seen = [j for j in range(len(blocks)) if (h, i, j) not in skipped]
                keys = [token for j in seen for token in blocks[j]]
                own = logits[0, h, rows][:, keys]
                assert torch.allclose(out[0, h, rows], own.softmax(-1) @ v[0, h, keys], atol=1e-5)
                assert lse is not None
                assert torch.allclose(lse[0, h, rows], own.logsumexp(-1), atol=1e-5)
        if before is not None and step < 4:  # at the last step nothing is noted any more
            for h in range(2):
                for i, rows in enumerate(blocks[:-1]):
                    for j, columns in enumerate(blocks[:-1]):
                        apart = logits[0, h, rows][:, columns] - before[0, h, rows, None]
                        if i != j and float(apart.max()) < math.log(0.02):
                            skipped.add((h, i, j))
        before = lse
        left_out.append(len(skipped))
    assert left_out[0] == 0 < left_out[1] <= left_out[2] and left_out[-1] < 2 * 64


def test_largest_logits_are_of_what_is_seen() -> None:
    layout = LAYOUTS["odd"]
    q, k, v = (x.float() for x in tensors(layout))
    selection = TOP.select(q, k, v, layout, SCALE)
    reference = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1))
    found = largest_logits(q, k, selection, reference, SCALE)
    logits = q @ k.repeat_interleave(2, 1).mT * SCALE - reference[..., None]
    side = selection.q_side
    for i in range(len(side)):
        rows = side.tokens[0, 0, i][: int(side.length[0, 0, i])]
        for j in range(len(side)):
            columns = side.tokens[0, 0, j][: int(side.length[0, 0, j])]
            largest = logits[:, :, rows][..., columns].amax((-1, -2))
            largest = largest.masked_fill(selection.levels[:, :, i, j] == 0, -torch.inf)
            assert torch.allclose(found[:, :, i, j], largest, atol=1e-5)


# ---- cached LSEs and warm starts


def test_exact_masses_by_a_cached_lse() -> None:
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    pattern = TopBlocks(0.4, block=8, score="exact")
    _, lse = attend(
        q, k, v, TopBlocks(1.0, block=8).select(q, k, v, layout, SCALE), layout, None, SCALE
    )
    past = SelectorState(lse=lse)
    cached = pattern.select(q, k, v, layout, SCALE, past=past).levels
    # of a full LSE the masses are those of the softmax, but for the text's part in it
    assert (cached != pattern.select(q, k, v, layout, SCALE).levels).float().mean() < 0.1
    no_text = LAYOUTS["line"]
    q, k, v = tensors(no_text)
    _, lse = attend(
        q, k, v, TopBlocks(1.0, block=4).select(q, k, v, no_text, SCALE), no_text, None, SCALE
    )
    pattern = TopBlocks(0.4, block=4, score="exact")
    plain = pattern.select(q, k, v, no_text, SCALE).levels
    cached = pattern.select(q, k, v, no_text, SCALE, past=SelectorState(lse=lse)).levels
    assert torch.equal(cached, plain)
    # it is the cached one that counts: with one query of a block far above the others, only its
    # masses do, as those of the others are e^-9 of what they were
    heavy = lse + 9.0
    heavy[:, :, ::4] -= 9.0
    own = pattern.select(q, k, v, no_text, SCALE, past=SelectorState(lse=heavy)).levels
    assert (own != plain).float().mean() > 0.02
    far = pattern.select(q, k, v, no_text, SCALE, past=SelectorState(lse=lse - 1000)).broken
    assert not far.any()
    assert pattern.learns and not TOP.learns and Reuse(pattern).learns


def test_warm_clusters_begin_where_the_last_step_ended() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 60, 4, generator=generator)
    owner, means = kmeans(x, 7, 4)
    for group in range(7):
        mine = owner[0, 1] == group
        torch.testing.assert_close(means[0, 1, group], x[0, 1, mine].mean(0))
    again, _ = kmeans(x, 7, 2, means)
    assert torch.equal(again, kmeans(x, 7, 6)[0])
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    pattern = ClusterBlocks(0.5, 1, 5, 7, 2, 8, warm=2)
    past = SelectorState()
    pattern.select(q, k, v, layout, SCALE, past=past)
    warm = pattern.select(q, k, v, layout, SCALE, past=past)
    longer = ClusterBlocks(0.5, 1, 5, 7, 4, 8).select(q, k, v, layout, SCALE)  # 2, then 2
    assert torch.equal(warm.k_side.tokens, longer.k_side.tokens)
    assert torch.equal(warm.levels, longer.levels)


def test_every_selector_takes_a_past() -> None:
    layout = LAYOUTS["odd"]
    q, k, v = tensors(layout)
    for name in ("moba", "online_choice", "hashing", "reuse"):
        own = small(name).select(q, k, v, layout, SCALE, past=SelectorState())
        assert torch.equal(own.levels, small(name).select(q, k, v, layout, SCALE).levels)
