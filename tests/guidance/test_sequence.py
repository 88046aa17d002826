"""One video from several prompts: a loop over the whole sequence is written out, and the calls of
the pipeline are watched."""

import functools
import itertools
import math

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from support import tiny
from support.allocations import check_linear, joint_state, recorded
from support.planned import Stop

import visattn
from visattn.guidance import SoftPAG
from visattn.guidance.composition.ditctrl import generate_sequence
from visattn.guidance.composition.shared_segments import (
    WORD_SWAP,
    ShareSettings,
    _key_bits,
    _query_bits,
)
from visattn.guidance.composition.windows import Windows
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.label_bias import RegionMask
from visattn.guidance.edits.share_keys import ShareKV
from visattn.guidance.edits.steer import apply_edits

KINDS = ("wan21", "cogvideox")
VIDEOS = ("wan21", "wan22", "cogvideox", "cogvideox15")
AXES = {"wan21": 2, "cogvideox": 1}
PROMPTS = ("a red square moves right", "a blue circle moves left", "a red circle moves right")
ALWAYS = ShareSettings(start=0, stop=1.0)
LENGTH, SCALE, STEPS = 3, 3.0, 4


@functools.cache
def pipeline(kind):
    pipe = tiny.PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(**options):
    return {
        "negative_prompt": "blue circle",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "max_sequence_length": 10,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **tiny.SHAPE,
        **options,
    }


def sequence(kind, prompts=PROMPTS[:2], **options):
    return generate_sequence(pipeline(kind), prompts, **settings(**options)).frames


def noise(kind, frames, seed=0):
    """Latents of so many frames, of one sample."""
    shape = [1, 4, frames, 12, 8] if kind == "wan21" else [1, frames, 4, 12, 8]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows_of(kind, latents, overlap, count=2):
    starts = [n * (LENGTH - overlap) for n in range(count)]
    return [latents.narrow(AXES[kind], start, LENGTH) for start in starts]


def predicted(kind, latents, t, texts, empty):
    """The guided prediction for a segment, in calls of its own."""
    pipe = pipeline(kind)
    more = {}
    if kind == "cogvideox":
        make = pipe._prepare_rotary_positional_embeddings
        more["image_rotary_emb"] = make(96, 64, LENGTH, torch.device("cpu"))
    cond, uncond = (
        pipe.transformer(
            hidden_states=latents,
            timestep=t.expand(1),
            encoder_hidden_states=text,
            return_dict=False,
            **more,
        )[0]
        for text in (texts, empty)
    )
    return uncond + SCALE * (cond - uncond)


@torch.no_grad()
def loop(kind, prompts, overlap, generator, segments):
    """The sequence as one sample of the scheduler, its prediction blended from those of segments,
    each as often as it is named."""
    pipe = pipeline(kind)
    axis, count = AXES[kind], len(prompts)
    total = LENGTH + (count - 1) * (LENGTH - overlap)
    texts, empty = pipe.encode_prompt(list(prompts), "blue circle", True, max_sequence_length=10)
    own = noise(kind, total)
    x = [(i + 0.5) * 2 / LENGTH for i in range(LENGTH)]
    weight = torch.tensor([min(value, 2 - value) for value in x])
    along = [LENGTH if n == axis else 1 for n in range(5)]
    pipe.scheduler.set_timesteps(STEPS)
    pipe.scheduler.set_begin_index(0) if kind == "wan21" else None
    times, before = pipe.scheduler.timesteps, None
    for n, t in enumerate(times):
        added, weights = torch.zeros_like(own), torch.zeros_like(own)
        parts = windows_of(kind, own, overlap, count)
        for number in segments:
            part = parts[number]
            one = predicted(kind, part, t, texts[number : number + 1], empty[:1])
            start = number * (LENGTH - overlap)
            added.narrow(axis, start, LENGTH).add_(one * weight.reshape(along))
            weights.narrow(axis, start, LENGTH).add_(weight.reshape(along))
        found = added / weights
        if isinstance(pipe.scheduler, CogVideoXDPMScheduler):
            back = times[n - 1] if n else None
            own, before = pipe.scheduler.step(
                found, before, t, back, own, generator=generator, return_dict=False
            )
        else:
            own = pipe.scheduler.step(found, t, own, return_dict=False)[0]
    return own


class Spy(Edit):
    """Keeps the calls as the other edits left them."""

    stage = "read"

    def apply(self, state, strength):
        SEEN.append(state)


SEEN = []


def own_keys(state):
    """The keys and values that a pass had before any edit."""
    parts = len(state.call.passes)
    return [x.chunk(parts)[state.part] for x in (state.call.k, state.call.v)]


# ---- windows


@pytest.mark.parametrize(("length", "overlap"), [(3, 1), (7, 3), (13, 6), (5, 4), (4, 0)])
def test_weights_of_frames_sum_to_one_and_joining_undoes_splitting(length, overlap):
    windows = Windows((0, 1, 2, 3), length, overlap, 1)
    whole = torch.randn(1, windows.total, 2)
    parts = windows.split(whole)
    assert parts.shape == (4, length, 2)
    torch.testing.assert_close(windows.join(parts), whole)
    assert windows.join(parts.bfloat16()).dtype == torch.bfloat16
    x = (torch.arange(length).double() + 0.5) * 2 / length
    own = torch.minimum(x, 2 - x)
    if overlap and overlap <= length // 2:
        head, tail = own[:overlap], own[-overlap:]
        torch.testing.assert_close(windows.weights()[1, :overlap], head / (head + tail))
    alone = length - overlap
    assert windows.weights()[0, :alone].equal(torch.ones(alone).double())


# ---- the sequence


@pytest.mark.parametrize("kind", VIDEOS)
def test_one_prompt_is_the_pipeline_to_the_bit(kind):
    own = sequence(kind, PROMPTS[:1], output_type="pt")
    plain = pipeline(kind)(PROMPTS[0], **settings(output_type="pt")).frames
    assert own.equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_without_sharing_and_blending_each_segment_is_its_own_generation(kind):
    latents, last = noise(kind, 5), []

    def callback(pipe, step, timestep, tensors):
        last[:] = [tensors["latents"]]
        return {}

    options = {"latents": latents, "callback_on_step_end": callback}
    out = sequence(kind, overlap=1, share=None, blend=False, **options)
    alone = [
        pipeline(kind)(prompt, **settings(latents=part)).frames
        for prompt, part in zip(PROMPTS, windows_of(kind, latents, 1), strict=False)
    ]
    torch.testing.assert_close(last[0], torch.cat(alone), atol=1e-5, rtol=1e-6)
    axis = AXES[kind]
    middle = (alone[0].select(axis, 2) + alone[1].select(axis, 0)) / 2
    torch.testing.assert_close(out.select(axis, 2), middle, atol=1e-5, rtol=0)
    assert out.shape[axis] == 5


SCHEDULERS = {
    "UniPC": ("wan21", None),
    "Euler": ("wan21", lambda _: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "DPM++": (
        "wan21",
        lambda _: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ),
    "DDIM": ("cogvideox", None),
    "DPM with noise": ("cogvideox", CogVideoXDPMScheduler.from_config),
}


@pytest.fixture(params=SCHEDULERS)
def scheduled(request):
    kind, make = SCHEDULERS[request.param]
    pipe = pipeline(kind)
    before = pipe.scheduler
    pipe.scheduler = before if make is None else make(before.config)
    yield request.param, kind
    pipe.scheduler = before


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("pairs", "segments"), [(True, (0, 1, 1, 2)), (False, (0, 1, 2))])
def test_blending_is_that_of_the_whole_sequence_in_one_scheduler(scheduled, pairs, segments):
    """Overlaps of more than half a segment, where the middle one counts twice in pairs."""
    _, kind = scheduled
    generator = torch.Generator().manual_seed(7)
    options = {"latents": noise(kind, 5), "generator": torch.Generator().manual_seed(7)}
    out = sequence(kind, PROMPTS, overlap=2, share=None, pairs=pairs, **options)
    expected = loop(kind, PROMPTS, 2, generator, segments)
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def test_blending_samples_after_the_step_is_the_same_but_for_the_noise(scheduled):
    """Multistep schedulers and the corrector of UniPC keep a history of each segment, which was not
    blended: they are linear in it, so that it is as if it had been."""
    name, kind = scheduled
    windows = Windows((0, 1), LENGTH, 1, AXES[kind])

    def blended(pipe, step, timestep, tensors):
        return {"latents": windows.split(windows.join(tensors["latents"]))}

    seed = {"generator": torch.Generator().manual_seed(7)}
    latents = noise(kind, 5)
    own = sequence(kind, overlap=1, share=None, latents=latents, **seed)
    seed = {"generator": torch.Generator().manual_seed(7)}
    options = {"latents": windows.split(latents), "callback_on_step_end": blended, **seed}
    after = pipeline(kind)(list(PROMPTS[:2]), **settings(**options)).frames
    same = torch.allclose(windows.join(after), own, atol=2e-5, rtol=1e-5)
    assert same == (name != "DPM with noise")


@pytest.mark.parametrize("kind", KINDS)
def test_overlaps_are_equal_after_each_step(kind):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    out = sequence(kind, PROMPTS, overlap=2, share=ALWAYS, callback_on_step_end=callback)
    assert len(seen) == STEPS
    for latents in seen:
        assert len(latents) == 4
        assert latents[1].equal(latents[2])  # the middle segment, once in each pair
        latents = latents[[0, 1, 3]]
        for before, after in itertools.pairwise(latents):
            tail = before.narrow(AXES[kind] - 1, 1, 2)
            assert tail.equal(after.narrow(AXES[kind] - 1, 0, 2))
        assert not latents[0].equal(latents[1])
    first = out.narrow(AXES[kind], 0, LENGTH)
    torch.testing.assert_close(first, seen[-1][:1])


@pytest.mark.parametrize("kind", VIDEOS)
def test_number_of_frames(kind):
    per_segment = 4 if kind == "cogvideox15" else 3
    for overlap, transitions in ((0.5, 0), (2, 1)):
        options = {"num_inference_steps": 1, "share": None, "output_type": "pil"}
        video = sequence(kind, overlap=overlap, transitions=transitions, **options)
        count = 2 + transitions
        common = overlap if isinstance(overlap, int) else round(overlap * per_segment)
        total = per_segment * count - (count - 1) * common
        total -= kind == "cogvideox15"  # padding
        odd = total % 2 or not kind.startswith("cog")
        assert (len(video), len(video[0])) == (1, 4 * total - 3 if odd else 4 * total)


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_have_interpolated_embeddings(kind):
    pipe, given = pipeline(kind), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    sequence(kind, overlap=1, transitions=2, share=None, num_inference_steps=1)
    handle.remove()
    texts, empty = pipe.encode_prompt(
        list(PROMPTS[:2]), "blue circle", True, max_sequence_length=10
    )
    rows = [texts[0] + (texts[1] - texts[0]) * n / 3 for n in (0, 1, 1, 2, 2, 3)]
    own = given[0] if kind == "wan21" else given[0][6:]
    torch.testing.assert_close(own, torch.stack(rows), atol=1e-6, rtol=1e-6)
    other = given[1] if kind == "wan21" else given[0][:6]
    torch.testing.assert_close(other, empty[:1].expand(6, -1, -1), atol=1e-6, rtol=1e-6)


# ---- sharing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairs", "sources"), [(True, [0, 0, 2, 2]), (False, [0, 0, 1])])
def test_each_segment_has_the_keys_of_the_one_before_where_it_is_told(kind, pairs, sources):
    """In pairs the first of two has its own."""
    SEEN.clear()
    share = ShareSettings(layers=[0, 2], start=1, stop=3)
    with visattn.steer(pipeline(kind), Spy()):
        sequence(kind, PROMPTS, overlap=1, share=share, pairs=pairs)
    assert len(SEEN) == STEPS * 3 * 2
    assert {state.pass_ for state in SEEN} == {"cond", "uncond"}
    for state in SEEN:
        k, v = own_keys(state)
        shared = state.call.number in (0, 2) and state.call.step in (1, 2)
        before = sources if shared else [*range(len(sources))]
        assert state.k.equal(k[before])
        assert state.v.equal(v[before])


@pytest.mark.parametrize(
    ("share", "steps", "sharing"),
    [(ShareSettings(), 6, {1, 2}), (WORD_SWAP, 6, {0, 1}), (ShareSettings(), 50, {*range(2, 25)})],
)
def test_default_windows(share, steps, sharing):
    from visattn._arguments import in_window

    assert sharing == {n for n in range(steps) if in_window(share.start, share.stop, n, steps)}


def test_default_layers_are_the_last_sixth():
    SEEN.clear()
    with visattn.steer(pipeline("wan21"), Spy()):
        sequence("wan21", overlap=1)
    changed = [state.call for state in SEEN if state.k.ne(own_keys(state)[0]).any()]
    assert {(call.step, call.number) for call in changed} == {(1, 2)}  # of 3 layers and 4 steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_the_target_changes_nothing(kind):
    one = noise(kind, LENGTH)
    options = {"latents": torch.cat([one, one], AXES[kind]), "overlap": 0}
    own = sequence(kind, (PROMPTS[0],) * 2, share=ALWAYS, **options)
    plain = sequence(kind, (PROMPTS[0],) * 2, share=None, **options)
    torch.testing.assert_close(own, plain, atol=1e-6, rtol=0)


def gathered(state, subjects, tokens):
    """``m O_fg + (1 - m) O_bg`` with the keys of each restricted, sample by sample."""
    q, k, v = state.q, state.k, state.v
    image = torch.arange(state.image.start, state.image.stop)
    text = torch.tensor([p for first, end in state.texts for p in range(first, end)], dtype=int)
    out = (q @ k.mT * state.call.factor).softmax(-1) @ v
    for sample in (1, 3):  # the second of each pair
        both = []
        for wanted in (True, False):
            keys = torch.cat([text, image[subjects[sample - 1] == wanted]])
            logits = q[sample] @ k[sample][:, keys].mT * state.call.factor
            both.append(logits.softmax(-1) @ v[sample][:, keys])
        rows = torch.zeros(q.shape[2], dtype=torch.bool)
        rows[image] = subjects[sample]
        if len(text):
            rows[text[list(tokens[sample])]] = True
        out[sample] = torch.where(rows[:, None], *both)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_mask_guided_sharing_is_that_of_restricted_keys(kind):
    SEEN.clear()
    attention = "cross" if kind == "wan21" else "self"
    share = ShareSettings(layers=[2], start=1, stop=2, threshold=0.4)
    spies = [Spy(layers=[2], start=1, stop=2), Spy(layers=[0, 1], attention=attention)]
    with visattn.steer(pipeline(kind), spies):
        sequence(kind, PROMPTS, overlap=1, share=share, masks=["square", "circle", "circle"])
    tokens = [(2,)] * 4
    maps = []
    for state in SEEN:
        if state.call.step == 1 and state.call.number < 2 and state.pass_ == "cond":
            share_of = (state.q @ state.k.mT * state.call.factor).softmax(-1).mean(1)
            column = state.texts[0][0] + 2
            maps.append(share_of[:, state.image, column])
    assert len(maps) == 2
    mean = (sum(maps) / 2).unflatten(1, (3, 24))
    low, high = mean.amin(2, keepdim=True), mean.amax(2, keepdim=True)
    subjects = ((mean - low) / (high - low) >= 0.4).flatten(1)
    assert 0 < int(subjects.sum()) < subjects.numel()
    checked = [state for state in SEEN if state.call.number == 2]
    assert len(checked) == 2  # both passes
    for state in checked:
        assert state.k.equal(own_keys(state)[0][[0, 0, 2, 2]])
        torch.testing.assert_close(state.out, gathered(state, subjects, tokens), atol=1e-5, rtol=0)


def test_sharing_with_a_plan():
    """Shared keys within a sparse pattern: all of it is what the pattern is for."""
    pipe = pipeline("wan21")
    dense = sequence("wan21", overlap=1, share=ALWAYS)
    with visattn.sparse(pipe, visattn.patterns.Neighborhood((3, 3, 3)), guard=False):
        sparse = sequence("wan21", overlap=1, share=ALWAYS)
        SEEN.clear()
        with visattn.steer(pipe, Spy(layers=[2])):
            sequence("wan21", overlap=1, share=ALWAYS)
    assert all(state.call.sparse and state.k[1].equal(own_keys(state)[0][0]) for state in SEEN)
    assert sparse.isfinite().all()
    assert not sparse.equal(dense)


def test_memory_grows_with_the_segments():
    peaks = []
    for count in (2, 4, 8):
        prompts = (PROMPTS * 3)[:count]
        with recorded() as found:
            sequence("wan21", prompts, overlap=1, share=ALWAYS, num_inference_steps=2)
        peaks.append(found.peak)
    small, middle, large = peaks
    assert large - middle <= 2.3 * (middle - small), peaks


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_goes_with_it(kind):
    """Nothing at scale 0; else the perturbed pass shares keys too."""
    pipe, plain = pipeline(kind), sequence(kind, overlap=1, share=ALWAYS)
    with visattn.guide(pipe, SoftPAG({1: None}, scale=0.0)):
        assert sequence(kind, overlap=1, share=ALWAYS).equal(plain)
    SEEN.clear()
    with (
        visattn.guide(pipe, SoftPAG({1: None}, scale=2.0)),
        visattn.steer(pipe, Spy(layers=[2], passes=("perturbed",))),
    ):
        assert not sequence(kind, overlap=1, share=ALWAYS).equal(plain)
    assert len(SEEN) == STEPS
    assert all(state.k.equal(own_keys(state)[0][[0, 0]]) for state in SEEN)


class Halves:
    """Masks of subjects that are known: the first half of the tokens."""

    tokens = ((2,), (3,))

    def __call__(self, state):
        count = state.image.stop - state.image.start
        return (torch.arange(count) < count // 2).expand(2, -1)


def test_memory_of_mask_guided_sharing_is_linear_in_the_tokens():
    bits = (functools.partial(own, Halves()) for own in (_query_bits, _key_bits))
    edits = [ShareKV(source=0, samples=(1,)), RegionMask(q_bits=next(bits), k_bits=next(bits))]

    def make(tokens):
        state = joint_state(tokens, samples=2)
        return lambda: apply_edits(state, [(edit, torch.ones(1)) for edit in edits])

    peaks = check_linear(make)
    assert peaks[-1] < 8192**2  # a map of one byte a pair


# ---- what is refused, and what is left behind


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": "a red square"}, TypeError, "must be a list"),
        ({"prompts": []}, ValueError, "at least one"),
        ({"overlap": 3}, ValueError, r"overlap=3 must be from 0 to 2"),
        ({"overlap": 1.0}, ValueError, "below 1.0"),
        ({"overlap": -1}, ValueError, "overlap=-1"),
        ({"transitions": -1}, ValueError, "transitions=-1"),
        ({"masks": ["square"]}, ValueError, "each of the 2 prompts"),
        ({"masks": ["square", "square"]}, ValueError, "must be a part of the prompt"),
        ({"masks": ["square", "circle"], "share": None}, ValueError, "leave one of them out"),
        (
            {"masks": ["square", "circle"], "share": ShareSettings(layers=[0])},
            ValueError,
            "a layer before those that share",
        ),
        ({"num_videos_per_prompt": 2}, ValueError, "num_videos_per_prompt=2 is not allowed"),
        ({"latents": torch.zeros(1, 4, 3, 12, 8)}, ValueError, "5 frames in axis 2"),
        ({"num_inference_steps": 1, "share": ShareSettings(start=1, stop=2)}, ValueError, "no att"),
        ({"share": ShareSettings(layers=[7])}, ValueError, "names layer 7"),
    ],
)
def test_what_is_refused_leaves_the_pipeline_as_it_was(options, error, message):
    pipe = pipeline("wan21")
    before = tiny.footprint(pipe), vars(pipe).keys(), vars(pipe.scheduler).keys()
    with pytest.raises(error, match=message):
        sequence("wan21", **{"prompts": PROMPTS[:2], "overlap": 1, **options})
    assert (tiny.footprint(pipe), vars(pipe).keys(), vars(pipe.scheduler).keys()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_on_the_way_leaves_the_pipeline_as_it_was(kind):
    pipe = pipeline(kind)
    plain, before = tiny.generate(pipe), tiny.footprint(pipe)

    def callback(*_):
        raise Stop

    with pytest.raises(Stop):
        sequence(kind, overlap=1, share=ALWAYS, callback_on_step_end=callback)
    for name in ("encode_prompt", "prepare_latents"):
        assert name not in vars(pipe)
    assert "step" not in vars(pipe.scheduler)
    assert tiny.footprint(pipe) == before
    assert tiny.generate(pipe).equal(plain)


def test_a_pipeline_that_begins_with_an_image_is_refused():
    with pytest.raises(TypeError, match="text-to-video"):
        generate_sequence(tiny.image_to_video(), PROMPTS[:2])


def test_a_callback_can_end_it():
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    out = sequence("wan21", overlap=1, callback_on_step_end=callback)
    assert out.shape == (1, 4, 5, 12, 8)
    assert not math.isnan(float(out.sum()))
