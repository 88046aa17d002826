"""Enhance-A-Video equals the sum over frames and sites that is written out."""

import pytest
import torch
from support import tiny, tiny_images
from support.allocations import check_linear
from support.planned import Stop, traces
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn.guidance import steer
from visattn.guidance.edits import enhance_a_video as module
from visattn.guidance.edits.enhance_a_video import EnhanceVideo, cross_frame_intensity
from visattn.inject import sparse
from visattn.patterns import Dense, Diagonal

FRAMES, SITES = 3, 24
VIDEO = {"wan21": slice(0, 72), "cogvideox": slice(10, 82)}


def intensity(q, k, factor):
    """Of one sample ``[H, T, sites, D]``."""
    found = []
    for head in range(q.shape[0]):
        for site in range(q.shape[2]):
            weights = (q[head, :, site] @ k[head, :, site].T * factor).softmax(1)
            rest = [weights[i, j] for i in range(len(weights)) for j in range(i)]
            rest += [weights[j, i] for i in range(len(weights)) for j in range(i)]
            found.append(torch.stack(rest).mean())
    return torch.stack(found).mean()


class Enhanced(TorchFunctionMode):
    """Attention by the map, in float64, its video rows with the gain."""

    def __init__(self, rows, weight):
        super().__init__()
        self.rows, self.weight, self.gains = rows, weight, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] or (kwargs[n] for n in ("query", "key", "value"))
        if q.shape[2] != k.shape[2] or q.shape[2] < SITES:  # of text, or to it
            return func(*args, **(kwargs or {}))
        q, k, v = q.double(), k.double(), v.double()
        out = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v
        for n in range(len(q)):
            own, other = (x[n, :, self.rows].unflatten(1, (FRAMES, SITES)) for x in (q, k))
            own = intensity(own, other, q.shape[3] ** -0.5)
            self.gains.append(max(1.0, float(own * (FRAMES + self.weight))))
            out[n, :, self.rows] *= self.gains[-1]
        return out.float()


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_intensity_equals_the_loop(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 4, 7, 5, dtype=torch.float64)
    expected = torch.stack([intensity(q[n], k[n], 0.4) for n in range(2)])
    for chunk in (1 << 22, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        torch.testing.assert_close(cross_frame_intensity(q, k, 0.4), expected)
    assert cross_frame_intensity(q.bfloat16(), k.bfloat16(), 0.4).dtype == torch.float32


def test_intensity_of_frames_alike_is_one_over_their_number():
    q = torch.randn(1, 2, 1, 6, 8).expand(1, 2, 5, 6, 8)
    torch.testing.assert_close(cross_frame_intensity(q, q, 0.3), torch.tensor([0.2]))


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_generation_equals_the_map(kind):
    pipe = tiny.PIPELINES[kind]()
    plain = tiny.generate(pipe)
    with Enhanced(VIDEO[kind], 3.4) as oracle:
        expected = tiny.generate(pipe)
    assert len(set(oracle.gains)) > 1
    assert min(oracle.gains) > 1
    with steer(pipe, EnhanceVideo(weight=3.4)):
        found = tiny.generate(pipe)
    assert error(found, expected) < 1e-5 < 1e-2 < error(found, plain)


def test_text_rows_other_heads_and_weak_gains_stay(monkeypatch):
    pipe = tiny.cogvideox()
    before, plain = [], tiny.generate(pipe)
    own = EnhanceVideo.apply

    def watched(self, state, strength):
        before.append(state.out)
        own(self, state, strength)
        before.append(state.out)

    monkeypatch.setattr(EnhanceVideo, "apply", watched)
    with steer(pipe, EnhanceVideo(layers=[1], heads=[0, 2])):
        tiny.generate(pipe, steps=1)
    for old, new in zip(before[::2], before[1::2], strict=True):
        assert new[:, :, :10].equal(old[:, :, :10])
        assert new[:, [1, 3]].equal(old[:, [1, 3]])
        ratio = new[:, [0, 2], 10:] / old[:, [0, 2], 10:]
        gain = ratio.mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(ratio, gain.expand_as(ratio), atol=1e-4, rtol=1e-4)
        assert float(gain.min()) > 1
    with steer(pipe, EnhanceVideo(weight=-3.0)):  # no intensity is above 1 / T by so much
        assert tiny.generate(pipe).equal(plain)


def test_an_image_stays():
    pipe = tiny_images.flux()
    plain = tiny_images.generate(pipe)
    with steer(pipe, EnhanceVideo(weight=100.0)):
        assert tiny_images.generate(pipe).equal(plain)


def test_with_a_plan_and_after_an_error():
    pipe = tiny.wan21()
    plain, before = tiny.generate(pipe), traces(pipe)
    with steer(pipe, EnhanceVideo()):
        enhanced = tiny.generate(pipe)
        with sparse(pipe, Dense()):
            assert error(tiny.generate(pipe), enhanced) < 1e-5
        with sparse(pipe, Diagonal(5)):
            assert error(tiny.generate(pipe), enhanced) > 1e-3

    def stop(*_):
        raise Stop

    with pytest.raises(Stop), steer(pipe, EnhanceVideo()):
        tiny.generate(pipe, callback_on_step_end=stop)
    assert traces(pipe) == before
    assert tiny.generate(pipe).equal(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": float("inf")}, r"weight=inf\) must be a finite number"),
        ({"attention": "cross"}, "keys of cross-attention are not frames"),
        ({"stream": "text"}, "it changes the video rows only"),
    ],
)
def test_bad_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        EnhanceVideo(**options)


def test_memory_is_linear():
    def make(tokens):
        q, k = torch.randn(2, 1, 2, 16, tokens // 16, 16)
        return lambda: cross_frame_intensity(q, k, 0.25)

    check_linear(make, heads=2)
