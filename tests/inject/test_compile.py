"""Plans and ``torch.compile``: one graph, in whichever order they come, changed, and taken away."""

from itertools import product

import pytest
import torch
from support import tiny
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Dense, Diagonal, MultiDiagonal, Neighborhood
from visattn.plan import Plan, Rule
from visattn.runtime.private_names import never_compile_alone

HEADS = (Diagonal(3), Neighborhood((1, 3, 3)), Dense(), MultiDiagonal(1))
PLAN = Plan((Rule(HEADS),))
STEPPED = Plan((Rule(HEADS, pass_="cond"), Rule(Diagonal(1), phase=1)), phases=(0.5,))


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(pipe, way):
    """The denoiser compiled in one of the ways there are; counts its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    model = pipe.transformer
    if way == "wrapped":
        pipe.transformer = torch.compile(model, backend=counter, fullgraph=True)
    elif way == "in place":
        model.compile(backend=counter, fullgraph=True)
    elif hasattr(model, "_repeated_blocks") and model._repeated_blocks:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        for block in model.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
    return counter


def close(x, y):
    return (x - y).abs().max() < 2e-5


# Pairwise: every model with every way, and every way and every model in both orders.
CASES = [
    ("wan21", "wrapped", "plan first"),
    ("wan21", "in place", "compiled first"),
    ("wan21", "blocks", "plan first"),
    ("cogvideox", "wrapped", "compiled first"),
    ("cogvideox", "in place", "plan first"),
    ("cogvideox", "blocks", "compiled first"),
]


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_cases_are_pairwise(pair):
    values = [{case[place] for case in CASES} for place in pair]
    assert {tuple(case[place] for place in pair) for case in CASES} == set(product(*values))


@pytest.mark.second
@pytest.mark.parametrize(
    ("name", "way", "order"), [*CASES, ("hunyuanvideo", "wrapped", "compiled first")]
)
def test_compiled_pipeline_runs_its_plan(name, way, order):
    pipe = tiny.PIPELINES[name]()
    dense = tiny.generate(pipe)
    apply_plan(pipe, PLAN)
    sparse = tiny.generate(pipe)
    apply_plan(pipe, STEPPED)
    stepped = tiny.generate(pipe)
    remove_plan(pipe)
    assert not close(sparse, stepped)
    # CogVideoX's first block is another graph than the rest even without a plan
    once = 2 if (name, way) == ("cogvideox", "blocks") else 1
    if order == "plan first":
        apply_plan(pipe, PLAN)
        counter = compiled(pipe, way)
        earlier = 0
    else:
        counter = compiled(pipe, way)
        assert close(tiny.generate(pipe), dense)
        assert counter.frame_count == once
        earlier = once
        apply_plan(pipe, PLAN)
    assert close(tiny.generate(pipe), sparse)
    assert counter.frame_count == earlier + once
    calls = 3 if name == "cogvideox" else 6
    assert [row.sparse_calls for row in summary(pipe).layers] == [calls] * tiny.LAYERS
    apply_plan(pipe, STEPPED)  # another plan needs no other graph
    assert close(tiny.generate(pipe), stepped)
    assert counter.frame_count == earlier + once
    remove_plan(pipe)
    assert close(tiny.generate(pipe), dense)
    assert counter.frame_count <= 2 * once


@pytest.mark.second
@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
def test_compiled_pipeline_at_a_second_resolution(name):
    pipe = tiny.PIPELINES[name]()
    other = {"height": 64, "width": 96, "num_frames": 17}
    apply_plan(pipe, PLAN)
    first, second = tiny.generate(pipe), tiny.generate(pipe, **other)
    compiled(pipe, "wrapped")
    assert close(tiny.generate(pipe), first)
    assert close(tiny.generate(pipe, **other), second)
    assert close(tiny.generate(pipe), first)


def graphs(plan, way, **options):
    """The number of graphs after calls of a denoiser at each of several sizes."""
    torch._dynamo.reset()
    model = tiny.wan_transformer(1, layers=1)
    counter = CompileCounter()
    call = model
    sizes = ((3, 8, 12, 9), (2, 12, 8, 9), (3, 12, 10, 7))
    calls = [
        {
            "hidden_states": torch.randn(1, 4, frames, height, width),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, text, 16),
        }
        for frames, height, width, text in sizes
    ]
    with torch.no_grad():
        if plan is not None:
            apply_plan(model, plan, guard=False)
        expected = [model(**own).sample for own in calls]
        if way == "blocks":
            model.compile_repeated_blocks(backend=counter, fullgraph=True, **options)
        else:
            call = torch.compile(
                model if way == "model" else lambda **own: model(**own),
                backend=counter,
                fullgraph=True,
                **options,
            )
        found = []
        for own, right in zip(calls, expected, strict=True):
            assert close(call(**own).sample, right)
            found.append(counter.frame_count)
    if plan is not None:
        rows = summary(model).layers
        assert all((row.sparse_calls, row.dense_calls) == (6, 0) for row in rows)
    return found


@pytest.mark.second
@pytest.mark.parametrize(
    ("way", "options"),
    [("blocks", {"dynamic": True}), ("model", {}), ("function", {})],
)
def test_a_plan_adds_no_graph_for_another_resolution(way, options):
    """Sizes and text lengths are data, and no Python values that a graph is guarded by."""
    assert graphs(Diagonal(0.1), way, **options) == graphs(None, way, **options)


def test_layers_with_and_without_a_plan_make_two_graphs():
    pipe = tiny.wan21(layers=6)
    plan = Plan(PLAN.rules, dense_layers=(0, 3))
    apply_plan(pipe, plan)
    expected = tiny.generate(pipe)
    counter = compiled(pipe, "blocks")
    assert close(tiny.generate(pipe), expected)
    assert counter.frame_count == 2


@pytest.mark.second
def test_inductor_runs_a_plan():
    pipe = tiny.wan21(layers=1)
    apply_plan(pipe, PLAN)
    expected = tiny.generate(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)
    assert close(tiny.generate(pipe), expected)


@pytest.mark.second
def test_dense_plan_of_a_compiled_pipeline_changes_no_bit():
    pipe = tiny.wan21()
    compiled(pipe, "wrapped")
    dense = tiny.generate(pipe)
    apply_plan(pipe, Plan(PLAN.rules, dense_steps=(1.0, 0)))
    assert torch.equal(tiny.generate(pipe), dense)
    assert all(row.dense_calls == 6 for row in summary(pipe).layers)


def gradient(model):
    torch.manual_seed(0)
    out = model(
        hidden_states=torch.randn(1, 4, 3, 12, 8),
        timestep=torch.tensor([3]),
        encoder_hidden_states=torch.randn(1, 10, 16),
    )
    out.sample.sum().backward()
    weight = next(p for name, p in model.named_parameters() if name.endswith("0.attn1.to_q.weight"))
    own, weight.grad = weight.grad, None
    return own


@pytest.mark.second
def test_gradients_are_taken_outside_the_graph_or_refused():
    """The op has none; where the graph may end, the layer runs as it does without a compiler."""
    pipe = tiny.wan21(layers=1)
    apply_plan(pipe, PLAN)
    expected = gradient(pipe.transformer)
    model = torch.compile(pipe.transformer, backend="eager")
    assert close(gradient(model), expected)
    assert [row.sparse_calls for row in summary(pipe).layers] == [2]
    torch._dynamo.reset()
    model = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        gradient(model)


def test_torch_without_the_private_names_that_spare_a_graph(monkeypatch):
    from torch._C._dynamo import eval_frame

    for name in ("_FrameAction", "_FrameExecStrategy", "set_code_exec_strategy"):
        with monkeypatch.context() as patch:
            patch.delattr(eval_frame, name)
            function = not_a_graph_of(torch.sin)
            assert torch.equal(function(torch.ones(2)), torch.ones(2).sin())


def not_a_graph_of(inner):
    def function(x):
        return inner(x)

    never_compile_alone(function)
    return torch.compile(function, backend="eager")
