"""The presets: what the script writes, and that each fits the model and the grid that it names."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from visattn.bench.architectures import ARCHITECTURES, skeleton
from visattn.generation.silence_logs import quiet
from visattn.geometry.layout import TokenLayout
from visattn.inject.models.denoisers import attention_layers, describe
from visattn.patterns import Pattern
from visattn.pipelines.families import FAMILIES
from visattn.plan import PLAN_FILE, Plan, read_plan
from visattn.plan import read as source
from visattn.plan.show.plan_view import view_plan
from visattn.selectors import OnlineChoice

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assets" / "plans" / "presets"
NAMES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_presets
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return make_presets


@functools.cache
def model(architecture):
    """Paths of the layers of the real configuration, and what it is."""
    own = ARCHITECTURES[architecture]
    with quiet():
        whole = skeleton(own)
    family = FAMILIES[own.model]
    return tuple(attention_layers(whole, family)), describe(whole, family)


def test_files_are_what_the_script_writes(script):
    made = script.plans()
    assert sorted(made) == NAMES, "run scripts/make_presets.py, and remove what it does not write"
    for name, plan in made.items():
        own = (FOLDER / name / PLAN_FILE).read_text(encoding="utf-8")
        assert own == plan.to_json(), f"{name} is stale: run scripts/make_presets.py"


@pytest.mark.parametrize("name", NAMES)
def test_preset_fits_its_model_and_grid(name, script):
    plan = read_plan(FOLDER / name)
    layers, denoiser = model(script.PRESETS[name].architecture)
    for role in plan.denoisers:
        plan.fits(role, denoiser, layers)
        tables = [plan.table(role, n, layers, denoiser.heads) for n in range(len(layers))]
        assert [n for n, table in enumerate(tables) if not table] == list(plan.dense_layers)
    view = view_plan(plan, paths=dict.fromkeys(plan.denoisers, layers))
    assert view.misfits == {}
    assert plan.evidence == {}
    assert plan.provenance["kind"] == "preset, unsearched"
    assert {"source", "setting", "video", "density"} <= set(plan.provenance)
    [pattern] = {pattern for rule in plan.rules for pattern in rule.heads}
    pattern.check(plan.geometry.grids[0][1])
    alternatives = pattern.patterns if isinstance(pattern, OnlineChoice) else (pattern,)
    for own in alternatives:
        assert isinstance(own, Pattern)
        assert own.density(plan.geometry) == pytest.approx(plan.provenance["density"], abs=5e-7)


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_of_the_video_that_it_names(name, script):
    """Latent frames of 4 but the first, tokens of 16 x 16 pixels."""
    own = script.PRESETS[name]
    frames, size = own.video.split(" frames of ")
    height, width = map(int, size.split("x"))
    assert own.grid.shape == ((int(frames) - 1) // 4 + 1, height // 16, width // 16)
    if own.steps is not None:
        dense = [count for count in own.dense_steps if isinstance(count, int)]
        assert sum(dense) < own.steps


# what is known of the published settings from elsewhere: see tests/patterns/test_published.py
DENSITIES = {
    "wan2.1-14b-radial": 0.2871,
    "wan2.2-a14b-radial": 0.3525,
    "wan2.1-14b-radial-161-frames": 0.260,
    "wan2.1-14b-sparse-videogen": 0.340,
    "hunyuanvideo-radial": 0.2746,
    "hunyuanvideo-sliding-tile": 0.4167,
    "hunyuanvideo-neighborhood": 0.09,
}


@pytest.mark.parametrize(("name", "density"), DENSITIES.items())
def test_densities_are_the_published_ones(name, density):
    plan = Plan.from_pretrained(FOLDER / name)
    assert plan.provenance["density"] == pytest.approx(density, abs=6e-4)


def test_density_beside_the_text_is_the_published_one():
    """Of all pairs, with the text seen by all and seeing all."""
    plan = Plan.from_pretrained(FOLDER / "hunyuanvideo-sparse-videogen")
    video, text = plan.geometry.length, 256
    pairs = plan.provenance["density"] * video**2 + 2 * video * text + text**2
    assert pairs / (video + text) ** 2 == pytest.approx(0.2489, abs=1e-4)


def test_sink_of_a_temporal_band_is_in_its_own_order():
    """The first 3600 places of (h, w, t) order: 171 places of a frame in all 21 frames, and 9
    frames of the next."""
    pattern = read_plan(FOLDER / "wan2.1-14b-sparse-videogen").rules[0].patterns
    sink = pattern.patterns[1].patterns[1]
    grid = Plan.from_pretrained(FOLDER / "wan2.1-14b-sparse-videogen").geometry.grids[0][1]
    layout = TokenLayout(grid)
    kept = sink.allows(torch.tensor([[grid.numel - 1]]), torch.arange(grid.numel), layout)[0]
    kept = kept.view(21, 3600)
    assert kept[:, :171].all()
    assert kept[:9, 171].all() and not kept[9:, 171].any()
    assert not kept[:, 172:].any()


@pytest.mark.parametrize("name", [name for name in NAMES if "sparse-videogen" in name])
def test_first_layers_are_rounded_down(name, script):
    """``math.floor(first_layers_fp * num_layers)`` in the authors' scripts: one of 40 and of 60."""
    plan = read_plan(FOLDER / name)
    [own] = {denoiser.layers for denoiser in plan.denoisers.values()}
    assert "first_layers_fp 0.03" in plan.provenance["setting"]
    assert plan.dense_layers == tuple(range(int(0.03 * own))) == (0,)
    assert "layers" not in plan.provenance["note"]


def test_auto_names_the_presets_of_a_model(tmp_path, monkeypatch):
    folder = tmp_path / "Wan2.2-T2V-A14B-Diffusers"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"unsearched presets .*presets: wan2\.2-a14b-radial\)"):
        read_plan("auto", model_path=str(folder))
    monkeypatch.setattr(source, "PRESETS", tmp_path / "none")
    with pytest.raises(ValueError, match="id of a plan, or a pattern"):
        read_plan("auto", model_path=str(folder))
