"""What changes nothing changes no bit: empty plans, plans of density 1, removed plans, and whatever
ended in an exception."""

import pytest
import torch
from support import tiny

from visattn.inject import apply_plan, observe, remove_plan, sparse, summary
from visattn.inject.attachment import Attachment
from visattn.patterns import AxisOrder, Block, Dense, Diagonal, Neighborhood, Radial, Union
from visattn.plan import Plan, Rule

SPARSE = Plan((Rule((Diagonal(2), Diagonal(5), Dense(), Radial(0.2, rule="token"))),))
WHOLE = Neighborhood((1.0, 1.0, 1.0))
HARMLESS = {
    "empty": Plan(),
    "dense pattern": Dense(),
    "density 1": WHOLE,
    "density 1 in four ways": Plan(
        (Rule((WHOLE, Block((1.0, 1.0, 1.0)), Union(WHOLE, Diagonal(1)), AxisOrder(WHOLE))),)
    ),
    "dense heads of a sparse layer that has no phase": Plan(
        (Rule(SPARSE.rules[0].patterns, phase=1),), phases=(0.99,)
    ),
    "all steps dense": Plan(SPARSE.rules, dense_steps=(1.0, 0)),
    "all layers dense": Plan(SPARSE.rules, dense_layers=tuple(range(tiny.LAYERS))),
    "another pass": Plan((Rule(SPARSE.rules[0].patterns, pass_="perturbed"),)),
}


@pytest.fixture(scope="module", params=tiny.PIPELINES)
def pipe(request):
    return tiny.PIPELINES[request.param]()


@pytest.fixture(scope="module")
def dense(pipe):
    return tiny.generate(pipe)


@pytest.mark.parametrize("plan", HARMLESS.values(), ids=HARMLESS)
def test_plan_without_effect_changes_no_bit(pipe, dense, plan):
    apply_plan(pipe, plan)
    assert torch.equal(tiny.generate(pipe), dense)
    for row in summary(pipe).layers:
        assert row.sparse_calls == 0
        assert row.reason is None
    remove_plan(pipe)


def test_removed_plan_changes_no_bit(pipe, dense):
    before = tiny.footprint(pipe)
    apply_plan(pipe, SPARSE)
    assert not torch.equal(tiny.generate(pipe), dense)
    assert tiny.footprint(pipe) != before
    remove_plan(pipe)
    assert tiny.footprint(pipe) == before
    assert torch.equal(tiny.generate(pipe), dense)
    remove_plan(pipe)  # twice is once


class Stop(Exception):
    pass


def query_of_a_layer(pipe):
    modules = pipe.transformer.named_modules()
    ends = ("blocks.1.attn1.to_q", "transformer_blocks.1.attn.to_q")
    return next(module for path, module in modules if path.endswith(ends))


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "attention"])
def test_exception_inside_a_generation_restores_everything(pipe, dense, error, where):
    before = tiny.footprint(pipe)

    def stop(*args, **kwargs):
        raise error

    if where == "callback":
        options = {"callback_on_step_end": stop}
    else:
        options = {}
        handle = query_of_a_layer(pipe).register_forward_pre_hook(stop)
    with pytest.raises(error), sparse(pipe, SPARSE):
        tiny.generate(pipe, **options)
    if where == "attention":
        handle.remove()
    assert tiny.footprint(pipe) == before
    assert torch.equal(tiny.generate(pipe), dense)


def test_plan_survives_an_exception(pipe):
    """The next generation is what it would have been."""
    apply_plan(pipe, SPARSE)
    expected = tiny.generate(pipe)

    def stop(*args, **kwargs):
        raise Stop

    handle = query_of_a_layer(pipe).register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        tiny.generate(pipe)
    handle.remove()
    assert torch.equal(tiny.generate(pipe), expected)
    remove_plan(pipe)


def test_sparse_gives_the_earlier_plan_back(pipe, dense):
    other = Plan((Rule(Diagonal(1)),))
    apply_plan(pipe, SPARSE)
    first = tiny.generate(pipe)
    with sparse(pipe, other):
        assert not torch.equal(tiny.generate(pipe), first)
    assert torch.equal(tiny.generate(pipe), first)
    with pytest.raises(ValueError, match="no_such"), sparse(pipe, "no_such(1)"):
        pass
    assert torch.equal(tiny.generate(pipe), first)
    apply_plan(pipe, other)  # the second replaces the first
    assert len({(row.role, row.layer) for row in summary(pipe).layers}) == len(
        summary(pipe).layers
    )
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), dense)


def test_apply_plan_builds_an_attachment_for_each_denoiser_once(monkeypatch):
    pipe, built = tiny.wan22(), []
    build = Attachment.__init__

    def counted(attachment, *arguments, **keywords):
        built.append(attachment)
        build(attachment, *arguments, **keywords)

    monkeypatch.setattr(Attachment, "__init__", counted)
    apply_plan(pipe, Diagonal(2))
    assert [attachment.role for attachment in built] == ["transformer", "transformer_2"]
    with observe(pipe, lambda _: None):
        assert len(built) == 4
