"""Latents that go down the gradient of a loss of token maps: autograd through the dense maps of a
whole forward says where."""

import functools

import pytest
import torch
from support import tiny
from support.allocations import recorded
from support.planned import OTHER, Stop, traces

import visattn
from visattn.guidance import SoftPAG
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.read_tokens import ReadTokens
from visattn.guidance.token_maps.latent_update import AStar, AttendAndExcite, LatentUpdate
from visattn.guidance.token_maps.losses import (
    astar_retention,
    astar_segregation,
    attend_and_excite,
)
from visattn.guidance.token_maps.token_readout import token_masks
from visattn.guidance.token_maps.update_latents import update_latents

KINDS = {"wan21": "cross", "cogvideox": "self"}
REAL = (0, 1, 2, 3, 4)
TOKENS = (1, 2)


class Spy(Edit):
    """Keeps the tensors of calls, with their gradients."""

    stage = "read"

    def apply(self, state, strength):
        SEEN.append((state.call, state.q, state.k, state.texts[0][0]))


SEEN = []


@functools.cache
def pipeline(kind):
    return tiny.PIPELINES[kind]()


def dense_maps(layers, normalise="real"):
    """``[samples, real tokens, T, H, W]`` from the whole maps of the layers seen."""
    total = 0
    for call, q, k, text in SEEN[:layers]:
        share = (q @ k.mT * call.factor).softmax(-1).mean(1)
        first, grid = call.layout.grids[0]
        total = total + share[:, first : first + grid.numel, text : text + len(REAL)]
    if normalise == "real":
        total = total / total.sum(-1, keepdim=True)
    else:
        total = total / layers
    return total.mT.unflatten(2, grid.shape)


def watch(pipe, monkeypatch):
    """What goes to the scheduler and to the denoiser."""
    seen = {"samples": [], "given": []}
    step, model = pipe.scheduler.step, pipe.transformer

    def stepped(model_output, timestep, sample, *args, **kwargs):
        seen["samples"].append(sample.clone())
        return step(model_output, timestep, sample, *args, **kwargs)

    functools.update_wrapper(stepped, step)
    monkeypatch.setattr(pipe.scheduler, "step", stepped, raising=False)
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen["given"].append(kwargs), with_kwargs=True
    )
    return seen, handle


def gradient_of(pipe, kind, given, loss, layers):
    """The gradient of a loss by the latents of a recorded call, through the whole forward."""
    model, SEEN[:] = pipe.transformer, []
    half = given["hidden_states"].shape[0] // (2 if kind == "cogvideox" else 1)
    mine = {
        name: value[-half:]
        if name in ("timestep", "encoder_hidden_states", "hidden_states")
        else value
        for name, value in given.items()
    }
    latents = mine["hidden_states"].clone().requires_grad_()
    with visattn.steer(model, Spy(attention=KINDS[kind])), torch.enable_grad():
        model(**{**mine, "hidden_states": latents})
        value = loss(dense_maps(layers))
        (slope,) = torch.autograd.grad(value.sum(), latents)
    return value.detach(), slope


def segregation(maps):
    return astar_segregation(maps[:, list(TOKENS)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [True, False])
def test_an_update_is_the_gradient_through_the_dense_maps(kind, recompute, monkeypatch):
    pipe = pipeline(kind)
    seen, handle = watch(pipe, monkeypatch)
    plain = tiny.generate(pipe, steps=1)
    (given, *_), (sample,) = list(seen["given"]), list(seen["samples"])
    del seen["given"][:], seen["samples"][:]
    update = LatentUpdate(
        tokens=TOKENS,
        loss=lambda maps, before: astar_segregation(maps),
        real=REAL,
        layers=[0, 1],
        scale=30.0,
        stop=1,
        recompute=recompute,
    )
    with update_latents(pipe, update) as losses:
        out = tiny.generate(pipe, steps=1)
    handle.remove()
    value, slope = gradient_of(pipe, kind, given, segregation, layers=2)
    torch.testing.assert_close(losses[0][0], value)
    assert float(slope.abs().max()) > 0
    expected = sample - 30.0 * slope
    torch.testing.assert_close(seen["samples"][0], expected, atol=1e-6, rtol=1e-5)
    # the partial call, then those of the pipeline, which all have the new latents
    for call in seen["given"][1:]:
        for part in call["hidden_states"].chunk(2 if kind == "cogvideox" else 1):
            torch.testing.assert_close(part, seen["samples"][0])
    assert len(seen["given"]) == (2 if kind == "cogvideox" else 3)
    assert seen["given"][0]["hidden_states"].shape[0] == 1
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_ends_at_the_last_layer_that_is_read(kind):
    pipe, ran = pipeline(kind), []
    model = pipe.transformer
    blocks = model.blocks if kind == "wan21" else model.transformer_blocks
    hooks = [
        block.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(blocks)
    ]
    update = LatentUpdate(
        tokens=(1,),
        loss=lambda maps, before: maps.flatten(1).sum(1),
        real=REAL,
        layers=[1],
        stop=1,
        recompute=False,
    )
    with update_latents(pipe, update):
        tiny.generate(pipe, steps=1)
    passes = 1 if kind == "cogvideox" else 2
    assert ran == [0, 1] + [0, 1, 2] * passes
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["astar", "attend_and_excite"])
def test_loss_decreases(kind, loss):
    common = {"real": REAL, "stop": 1, "layers": [0, 1], "recompute": False}
    if loss == "astar":
        update = AStar(tokens=TOKENS, scale=100.0, refine={0: 0.0}, refinements=6, **common)
    else:
        scale = 30.0 if kind == "wan21" else 10.0
        update = AttendAndExcite(
            subjects=TOKENS, scale=scale, refine={0: 0.0}, refinements=6, **common
        )
    with update_latents(pipeline(kind), update) as losses:
        tiny.generate(pipeline(kind), steps=2)
    values = torch.stack(losses[0])[:, 0]
    assert len(values) == 7
    assert (values.diff() < 0).all(), values


def test_refinement_ends_below_the_bound_and_for_each_sample_alone():
    pipe = pipeline("wan21")
    prompts = {"prompt": ["a red square moves right"] * 2, "negative_prompt": ["", ""]}
    given = {"tokens": TOKENS, "real": REAL, "scale": 0.5, "stop": 1, "layers": [0]}
    with update_latents(pipe, AStar(**given)) as losses:
        tiny.generate(pipe, steps=1, **prompts)
    (first,) = losses[0]
    assert first.shape == (2,)
    bound = float(first.mean())  # between the two samples
    with update_latents(pipe, AStar(**given, refine={0: bound}, refinements=50)) as losses:
        tiny.generate(pipe, steps=1, **prompts)
    values = torch.stack(losses[0])
    assert 2 < len(values) < 51
    low = int(first.argmin())
    assert bool((values[:, low] == values[0, low]).all())  # it stays meanwhile
    assert float(values[-1].max()) <= bound


def test_retention_is_of_the_maps_of_the_step_before():
    pipe, seen = pipeline("wan21"), []

    def loss(maps, before):
        seen.append((maps.detach().clone(), before))
        return AStar(tokens=TOKENS, real=REAL).losses(maps, before)

    update = LatentUpdate(tokens=TOKENS, loss=loss, real=REAL, stop=1.0)
    with update_latents(pipe, update) as losses:
        tiny.generate(pipe, steps=3)
        tiny.generate(pipe, steps=3)
    assert sorted(losses) == [0, 1, 2]
    assert seen[0][1] is None
    assert seen[3][1] is None  # another generation
    assert torch.equal(seen[1][1], seen[0][0])
    expected = astar_segregation(seen[1][0]) + astar_retention(
        seen[1][0], token_masks(seen[0][0], 0.5)
    )
    own = AStar(tokens=TOKENS, real=REAL).losses(*seen[1])
    torch.testing.assert_close(own, expected)


def test_sizes_fall_and_the_window_holds():
    pipe = pipeline("cogvideox")
    update = AttendAndExcite(subjects=(2,), real=REAL, refine={}, scale=20.0)
    assert [round(update.size(step, 50), 4) for step in (0, 49)] == [20.0, round(20 * 0.5**0.5, 4)]
    own = AttendAndExcite(subjects=(2,), real=REAL)
    assert [own.bound(step, 50) for step in (0, 1, 10, 20)] == [0.95, None, 0.5, 0.2]
    with update_latents(pipe, update) as losses:
        tiny.generate(pipe, steps=4)
    assert sorted(losses) == [0, 1]  # the first half


def test_schedulers_with_a_corrector_keep_the_update(monkeypatch):
    """Its corrected sample, by which UniPC predicts the next, moves by what the latents do."""
    pipe, corrected, added = pipeline("wan21"), [], []
    seen, handle = watch(pipe, monkeypatch)
    predict = pipe.scheduler.multistep_uni_p_bh_update

    def predicted(*args, sample, **kwargs):
        corrected.append(sample.clone())
        return predict(*args, sample=sample, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "multistep_uni_p_bh_update", predicted, raising=False)
    original = pipe.scheduler.multistep_uni_c_bh_update

    def correct(*args, **kwargs):
        added.append(original(*args, **kwargs))
        return added[-1]

    monkeypatch.setattr(pipe.scheduler, "multistep_uni_c_bh_update", correct, raising=False)
    update = LatentUpdate(
        tokens=(1,),
        loss=lambda maps, before: maps.flatten(1).amax(1),
        real=REAL,
        scale=100.0,
        start=1,
        stop=2,
    )
    plain = tiny.generate(pipe, steps=3)
    before = seen["samples"][1]
    for own in (corrected, added, seen["samples"]):
        own.clear()
    with update_latents(pipe, update):
        out = tiny.generate(pipe, steps=3)
    handle.remove()
    moved = seen["samples"][1] - before
    assert float(moved.abs().max()) > 1e-3
    torch.testing.assert_close(corrected[1] - added[0], moved, atol=1e-5, rtol=1e-4)
    assert torch.equal(corrected[2], added[1])  # a step without an update
    assert not torch.allclose(out, plain)


def test_an_update_by_next_to_nothing_changes_next_to_nothing():
    for kind in KINDS:
        update = AStar(tokens=TOKENS, real=REAL, scale=1e-9)
        with update_latents(pipeline(kind), update):
            out = tiny.generate(pipeline(kind), steps=4)
        torch.testing.assert_close(out, tiny.generate(pipeline(kind), steps=4))


def test_readouts_of_the_user_are_not_those_of_the_partial_forward():
    pipe, seen = pipeline("wan21"), []
    read = ReadTokens(tokens=TOKENS, attention="cross", sink=seen.append, passes=("cond",))
    update = LatentUpdate(
        tokens=(1,), loss=lambda maps, before: maps.flatten(1).sum(1), real=REAL, stop=1
    )
    with update_latents(pipe, update), visattn.steer(pipe, read):
        tiny.generate(pipe, steps=1)
    assert len(seen) == tiny.LAYERS


def test_without_classifier_free_guidance():
    pipe = pipeline("cogvideox")
    with update_latents(pipe, AStar(tokens=TOKENS, real=REAL, stop=1)) as losses:
        out = tiny.generate(pipe, steps=2, guidance_scale=1.0)
    assert sorted(losses) == [0]
    assert not torch.equal(out, tiny.generate(pipe, steps=2, guidance_scale=1.0))


@pytest.mark.parametrize("order", ["guide first", "update first"])
def test_with_guidance_and_a_plan(order, monkeypatch):
    pipe = pipeline("wan21")
    seen, handle = watch(pipe, monkeypatch)
    update = AStar(tokens=TOKENS, real=REAL, layers=[0], scale=50.0, stop=1)
    guidance = SoftPAG({1: [0, 2]}, strength=0.5)
    contexts = [
        lambda: visattn.guide(pipe, guidance, reuse_prefix=False),
        lambda: update_latents(pipe, update),
    ]
    first, second = contexts if order == "guide first" else contexts[::-1]
    with visattn.sparse(pipe, OTHER), first(), second():
        tiny.generate(pipe, steps=1)
    handle.remove()
    partial, *calls = seen["given"]
    assert len(calls) == 3  # cond, perturbed, uncond
    assert all(torch.equal(c["hidden_states"], seen["samples"][0]) for c in calls)
    assert not torch.equal(partial["hidden_states"], seen["samples"][0])


@pytest.mark.parametrize("kind", [*KINDS, "wan22"])
def test_the_pipeline_is_as_it_was_after_an_end_and_after_an_error(kind):
    pipe = tiny.PIPELINES[kind]()
    plain, before = tiny.generate(pipe), traces(pipe)
    wanted = [p.requires_grad for p in pipe.transformer.parameters()]
    scheduler = dict(vars(pipe.scheduler))

    def fails(maps, before):
        raise Stop

    for loss in (lambda maps, before: maps.flatten(1).sum(1), fails):
        update = LatentUpdate(tokens=(1,), loss=loss, real=REAL, stop=1.0)
        try:
            with update_latents(pipe, update):
                tiny.generate(pipe)
        except Stop:
            assert loss is fails
        assert [p.requires_grad for p in pipe.transformer.parameters()] == wanted
        assert set(vars(pipe.scheduler)) == set(scheduler)
        assert torch.equal(tiny.generate(pipe), plain)
    after = traces(pipe)
    assert before == after


def test_memory_of_a_recomputed_forward_is_less():
    peaks = []
    for recompute in (True, False):
        pipe = tiny.wan21(layers=8)
        update = LatentUpdate(
            tokens=(1,),
            loss=lambda maps, before: maps.flatten(1).amax(1),
            real=REAL,
            layers=[7],
            stop=1,
            recompute=recompute,
        )
        with recorded() as found, update_latents(pipe, update):
            tiny.generate(pipe, steps=1)
        peaks.append(found.peak)
    assert peaks[0] < 0.6 * peaks[1], peaks


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 2, 4, 5, dtype=torch.float64)
    layout = (torch.rand(1, 3, 2, 4, 5) > 0.5).double()
    for sample in range(2):
        a, b = maps[sample].flatten(1), layout[0].flatten(1)
        seg = sum(
            float(torch.minimum(a[m], a[n]).sum() / (a[m] + a[n]).sum())
            for m in range(3)
            for n in range(m)
        )
        ret = sum(
            1 - float(torch.minimum(a[m], b[m]).sum() / (a[m] + b[m]).sum()) for m in range(3)
        )
        assert float(astar_segregation(maps)[sample]) == pytest.approx(seg)
        assert float(astar_retention(maps, layout)[sample]) == pytest.approx(ret)
    same = maps[:, :1].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(astar_segregation(same), torch.full((2,), 0.5).double())
    apart = torch.stack([layout[0, 0], 1 - layout[0, 0]])[None]
    assert float(astar_segregation(apart)) == 0
    assert float(astar_retention(apart, apart)) == pytest.approx(1.0)  # half of each of two


@pytest.mark.parametrize("paper", [False, True])
def test_attend_and_excite_is_of_the_most_neglected_subject(paper):
    """By default with the blur of the authors' code, ``exp(-(x / (2 s))^2)`` with ``s = 0.5``."""
    from scipy.ndimage import convolve

    torch.manual_seed(1)
    maps = 0.05 * torch.rand(2, 4, 2, 5, 6, dtype=torch.float64)
    axis = torch.tensor([-1.0, 0.0, 1.0]).double()
    square = axis[:, None] ** 2 + axis**2
    kernel = torch.exp(-square / (2 * 0.5**2) if paper else -square / (2 * 0.5) ** 2)
    kernel = (kernel / kernel.sum()).numpy()
    share = (100 * maps).softmax(1)
    for sample in range(2):
        worst = [
            1 - max(convolve(own, kernel, mode="mirror").max() for own in share[sample, m].numpy())
            for m in (1, 3)
        ]
        found = attend_and_excite(maps, (1, 3), **({"sigma": 0.5} if paper else {}))
        assert float(found[sample]) == pytest.approx(max(worst))
    assert torch.isfinite(attend_and_excite(maps[..., :1, :1], (0,))).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AStar(tokens=(1,), real=REAL), ValueError, "one subject"),
        (lambda: AStar(tokens=(1, 2)), ValueError, "needs the indices of the real tokens"),
        (lambda: AttendAndExcite(subjects=(9,), real=REAL), ValueError, "some of the real tokens"),
        (lambda: LatentUpdate(tokens=(1,), real=REAL), TypeError, "must be a function of maps"),
        (
            lambda: LatentUpdate(tokens=(1,), real=REAL, loss=print, refine={-1: 0}),
            ValueError,
            "steps, or shares",
        ),
    ],
)
def test_updates_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_latents_that_the_scheduler_does_not_have_are_refused(monkeypatch):
    pipe = pipeline("cogvideox")
    monkeypatch.setattr(pipe.scheduler, "scale_model_input", lambda sample, _: 0.9 * sample)
    update = AStar(tokens=TOKENS, real=REAL)
    with (
        pytest.raises(ValueError, match="gives its denoiser other latents than its scheduler"),
        update_latents(pipe, update),
    ):
        tiny.generate(pipe, steps=2)
    assert "step" not in vars(pipe.scheduler)


def test_pipelines_that_cannot_be_updated_are_refused():
    update = AStar(tokens=(1, 2), real=REAL)
    pipe = pipeline("wan21")
    refused = [(pipe.transformer, TypeError, "must be a pipeline with a scheduler")]
    refused.append((tiny.image_to_video(), ValueError, "use a text-to-video pipeline"))
    for one, error, message in refused:
        with pytest.raises(error, match=message), update_latents(one, update):
            pass
    with pytest.raises(ValueError, match="has updated no latents"), update_latents(pipe, update):
        pass
    wrong = LatentUpdate(tokens=(1,), real=REAL, loss=lambda maps, before: maps.sum())
    with pytest.raises(ValueError, match="for each of the 1 samples"), update_latents(pipe, wrong):
        tiny.generate(pipe, steps=1)
    with pytest.raises(TypeError, match="must be a LatentUpdate"), update_latents(pipe, 3):
        pass


def test_losses_are_computed_without_autocast():
    pipe, seen = pipeline("wan21"), []

    def loss(maps, before):
        seen.append((maps.dtype, torch.is_autocast_enabled("cpu")))
        return maps.square().sum((1, 2, 3, 4))

    update = LatentUpdate(tokens=TOKENS, real=REAL, loss=loss, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), update_latents(pipe, update) as losses:
        tiny.generate(pipe, steps=2)
    assert seen and all(own == (torch.float32, False) for own in seen)
    assert losses and all(own.dtype == torch.float32 for step in losses.values() for own in step)
