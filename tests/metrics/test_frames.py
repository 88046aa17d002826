"""PSNR, SSIM, flicker and largest error against other code, and against values computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from visattn.metrics import compare_frames, flicker, max_error, psnr, ssim

SHAPES = [(1, 11, 11, 3), (1, 24, 16, 3), (3, 13, 37, 3), (5, 32, 11, 3)]


def clip(shape, seed):
    """Something smooth and something rough, [T, H, W, 3] in [0, 1]."""
    rough = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    t, y, x, _ = (torch.arange(n, dtype=torch.float32) for n in shape)
    wave = torch.sin(x / 3 + y[:, None] / 5 + t[:, None, None])[..., None]
    return ((0.5 + 0.3 * wave) + 0.2 * (rough - 0.5)).clamp(0, 1)


def close(value, expected):
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_psnr_and_ssim_equal_scikit_image(shape):
    a, b = clip(shape, 1), clip(shape, 2)
    pairs = [(x.double().numpy(), y.double().numpy()) for x, y in zip(a, b, strict=True)]
    ours = psnr(b, a)
    theirs = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
    assert all(map(close, ours.frames, theirs))
    whole = peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1)
    assert close(ours.clip, whole)
    ours = ssim(b, a)
    theirs = [
        structural_similarity(
            x,
            y,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in pairs
    ]
    assert all(map(close, ours.frames, theirs))
    assert close(ours.clip, np.mean(theirs))


def test_ssim_of_one_window_is_the_formula():
    """Equation 13 of the paper, written out for a frame that holds one window only."""
    a, b = clip((1, 11, 11, 3), 3), clip((1, 11, 11, 3), 4)
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weights = np.outer(weights, weights)
    weights /= weights.sum()
    values = []
    for channel in range(3):
        x, y = (f[0, :, :, channel].double().numpy() for f in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        top = (2 * mx * my + 0.0001) * (2 * cov + 0.0009)
        values.append(top / ((mx**2 + my**2 + 0.0001) * (vx + vy + 0.0009)))
    assert close(ssim(a, b).clip, np.mean(values))


def test_constant_difference_by_hand():
    a = torch.full((2, 16, 16, 3), 0.5, dtype=torch.float64)
    b = a.clone()
    b[1] += 0.1
    assert psnr(b, a).frames == (math.inf, pytest.approx(20.0))
    assert psnr(b, a).clip == pytest.approx(20 + 10 * math.log10(2))  # of the mean error of both
    assert max_error(b, a) == (pytest.approx(0.1), (0.0, pytest.approx(0.1)))
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert ssim(b, a).frames == (1.0, pytest.approx(luminance))


def test_flicker_is_the_change_of_the_change():
    frames = torch.zeros(5, 2, 2, 3, dtype=torch.float64)
    steady = frames + torch.arange(5).view(-1, 1, 1, 1) / 8
    assert flicker(steady) == (0.0, (None, 0.0, 0.0, 0.0, None))
    frames[2] = 1  # one bright frame: |1| before and after it, |2| at it
    assert flicker(frames) == (pytest.approx(4 / 3), (None, 1.0, 2.0, 1.0, None))
    frames[:, 0] = 0  # in half of the pixels
    assert flicker(frames).clip == pytest.approx(2 / 3)
    assert flicker(frames[:2]) == (None, (None, None))
    assert flicker(frames[:1]) == (None, (None,))


def test_comparison_holds_what_the_functions_return():
    a, b = clip((4, 16, 16, 3), 5), clip((4, 16, 16, 3), 6)
    found = compare_frames(b, a)
    assert found.psnr == psnr(b, a)
    assert found.ssim == ssim(b, a)
    assert found.max_error == max_error(b, a)
    assert (found.flicker, found.reference_flicker) == (flicker(b), flicker(a))
    assert found.flicker_ratio == flicker(b).clip / flicker(a).clip
    numbers = found.numbers(per_frame=True)
    assert numbers["psnr"] == found.psnr.clip
    assert [row["ssim"] for row in numbers["per_frame"]] == list(found.ssim.frames)
    assert "per_frame" not in found.numbers()


def test_equal_frames_are_json_without_infinity():
    a = clip((3, 16, 16, 3), 7)
    found = compare_frames(a, a)
    assert found.psnr == (math.inf, (math.inf,) * 3)
    assert found.ssim.clip == pytest.approx(1, abs=1e-12)
    numbers = json.loads(json.dumps(found.numbers(per_frame=True), allow_nan=False))
    assert numbers["psnr"] is None
    assert (numbers["max_error"], numbers["flicker_ratio"]) == (0, 1)
    assert numbers["per_frame"][0]["flicker"] is None
    still = compare_frames(a[:1].repeat(3, 1, 1, 1), a[:1].repeat(3, 1, 1, 1))
    assert (still.flicker.clip, still.flicker_ratio) == (0, None)


def test_arithmetic_is_float64():
    """In float32 the difference of 1e-9 would be lost."""
    a = torch.full((1, 11, 11, 3), 0.5, dtype=torch.float64)
    assert psnr(a + 1e-9, a).clip == pytest.approx(180, abs=1e-6)
    half = torch.full((1, 11, 11, 3), 0.3, dtype=torch.float16)
    assert psnr(half, half).clip == math.inf


BAD = {
    "three axes": (torch.zeros(11, 11, 3), "shape"),
    "channels first": (torch.zeros(1, 3, 11, 11), "shape"),
    "no frame": (torch.zeros(0, 11, 11, 3), "none empty"),
    "bytes": (torch.zeros(1, 11, 11, 3, dtype=torch.uint8), "uint8"),
    "array": (np.zeros((1, 11, 11, 3)), "ndarray"),
    "above one": (torch.full((1, 11, 11, 3), 1.01), "1.01"),
    "below zero": (torch.full((1, 11, 11, 3), -0.01), "-0.01"),
    "nan": (torch.full((1, 11, 11, 3), math.nan), "nan"),
}


@pytest.mark.parametrize(("frames", "word"), BAD.values(), ids=BAD)
def test_wrong_frames_are_refused(frames, word):
    fine = torch.zeros(1, 11, 11, 3)
    for call in (
        lambda: flicker(frames),
        lambda: psnr(frames, fine),
        lambda: ssim(fine, frames),
        lambda: max_error(frames, fine),
    ):
        with pytest.raises((TypeError, ValueError), match=word):
            call()


def test_wrong_pairs_are_refused():
    with pytest.raises(ValueError, match="must have the shape of reference"):
        psnr(torch.zeros(2, 11, 11, 3), torch.zeros(1, 11, 11, 3))
    with pytest.raises(ValueError, match="10x11 pixels are smaller than the window"):
        ssim(torch.zeros(1, 10, 11, 3), torch.zeros(1, 10, 11, 3))
