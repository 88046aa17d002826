"""The training script at toy size: losses fall, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visattn.generation import shape_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    """The training script as a module, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("train_tiny_wan", SCRIPTS / "train_tiny_wan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.split(".")[0] == "tiny_wan"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def toy(script):
    """The smallest preset."""
    return script.PRESETS["toy"]


@pytest.fixture(scope="module")
def run(script, toy, tmp_path_factory):
    """A finished run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tiny_wan.stages"], "say", lines.append)
        patch.setattr(sys.modules["tiny_wan.stages"], "REPORT_EVERY", 6)
        patch.setattr(sys.modules["tiny_wan.stages"], "JUDGE_EVERY", 12)
        assert script.train_autoencoder(toy, folder, script.Clock())
        assert script.train_decoder(toy, folder, script.Clock())
        assert script.train_denoiser(toy, folder, script.Clock())
    return folder, lines


def figures(lines, stage, word):
    found = [re.search(rf"{word} (-?[\d.]+)", line) for line in lines if line.startswith(stage)]
    return [float(match.group(1)) for match in found if match]


def test_losses_fall(run):
    _, lines = run
    autoencoder = figures(lines, "autoencoder", "loss")
    assert autoencoder[-1] < 0.7 * autoencoder[0]
    held_out = figures(lines, "autoencoder", "held out dB")
    assert held_out[-1] > held_out[0]
    denoiser = figures(lines, "denoiser", "loss at 2x4x4:")
    assert denoiser[-1] < denoiser[0]


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "denoiser"])
def test_a_resumed_run_equals_an_uninterrupted_one(script, toy, run, stage, tmp_path):
    whole, _ = run
    for file in whole.glob("*.pt"):
        if file.stem != stage:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    train = getattr(script, f"train_{stage}")
    steps = getattr(toy, f"{stage}_steps")
    assert not train(toy, tmp_path, script.Clock(last=steps // 2))
    assert train(toy, tmp_path, script.Clock())
    first, second = (script.load_checkpoint(folder / f"{stage}.pt") for folder in (whole, tmp_path))
    assert first["step"] == second["step"] == steps
    for part in {"model", "average"} & first.keys():
        for name, weights in first[part].items():
            assert torch.equal(weights, second[part][name]), f"{part} {name}"


def test_a_run_out_of_time_stops_with_a_checkpoint(script, toy, tmp_path):
    assert not script.train_autoencoder(toy, tmp_path, script.Clock(minutes=0))
    assert script.load_checkpoint(tmp_path / "autoencoder.pt")["step"] == 0
    assert not list(tmp_path.glob("*.partial"))


def test_the_decoder_alone_leaves_the_latents_as_they_are(script, run):
    folder, _ = run
    before, after = (
        script.load_checkpoint(folder / name)["model"] for name in ("autoencoder.pt", "decoder.pt")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_evaluation_and_export(script, toy, run, tmp_path, monkeypatch):
    from diffusers import WanPipeline

    folder, _ = run
    monkeypatch.setattr(script, "say", lambda line: None)
    monkeypatch.setattr(script, "DEFAULT_STEPS", 2)
    found = script.evaluate(toy, folder, 2, 1)
    assert json.loads((folder / "evaluation.json").read_text())["evaluation"]["pairs"] == 2
    assert set(found["evaluation"]) >= {"colour", "object", "direction", "background"}
    structure = found["evaluation"]["structure"]
    assert structure["heads"] == 4 and set(structure["few"]) == {"64", "32", "16"}
    assert (folder / "sheet-evaluation.png").read_bytes().startswith(b"\x89PNG")

    target = tmp_path / "tiny-wan"
    script.export(toy, folder, target, "A toy.")
    index = json.loads((target / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    suffixes = {path.suffix for path in target.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".safetensors"}
    card = (target / "README.md").read_text()
    assert "A toy." in card
    assert f"| evaluation | {structure['few']['64']} of 4 |" in card
    assert shape_of(target) == {
        "num_frames": 9,
        "height": 48,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
    }
    assert shape_of(target, "evaluation")["num_frames"] == 5

    # The exported pipeline makes nearly the video of the trained one, with its own defaults.
    pipelines = (script.load_pipeline(toy, folder)[0], WanPipeline.from_pretrained(target))
    videos = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        video = pipeline(
            "a red square moves left over the fog",
            num_frames=5,
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        videos.append(video.frames[0])
    assert videos[0].shape == (5, 3, 32, 32)
    assert float((videos[0] - videos[1]).abs().max()) < 0.02


def test_text_is_embedded_as_the_pipeline_embeds_it(script, toy, run):
    from tiny_wan.parts import encode_text

    pipeline, _ = script.load_pipeline(toy, run[0])
    captions = ["a red square moves left over the fog", "", "a blue 4 glides up"]
    ours = encode_text(pipeline.text_encoder, pipeline.tokenizer, captions, 24)
    theirs, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=24
    )
    assert torch.allclose(ours, theirs, atol=1e-6)
    unknown = pipeline.tokenizer.unk_token_id
    assert unknown not in pipeline.tokenizer("a blue 4 glides up and bounces back")["input_ids"]


def test_clips_are_functions_of_seed_and_index(script):
    from tiny_wan.captions import combinations
    from tiny_wan.scenes import Settings, draw_clip

    for rich in (False, True):
        settings = Settings((5, 48, 64), rich=rich)
        first, again, other = (draw_clip(settings, 3, index) for index in (8, 8, 9))
        assert torch.equal(first.frames, again.frames)
        assert first.caption == again.caption
        assert not torch.equal(first.frames, other.frames)
        assert first.frames.shape == (5, 3, 48, 64)
        assert 0 <= float(first.frames.min()) <= float(first.frames.max()) <= 1

    with pytest.raises(ValueError, match="at least 32 pixels"):
        Settings((5, 16, 64))

    held_out = combinations(held_out=True)
    trained = combinations(held_out=False)
    assert not set(held_out) & set(trained)
    assert 0.05 < len(held_out) / (len(held_out) + len(trained)) < 0.15
    drawn = {draw_clip(Settings((1, 32, 32)), 0, index).scene for index in range(300)}
    assert not drawn & set(held_out)


def test_digit_instances_are_split(script):
    from tiny_wan.sprites import digit_images

    for digit in (0, 2, 4, 7):
        trained, held_out = (digit_images(digit, kept).flatten(1) for kept in (False, True))
        assert len(trained) > 100
        assert len(held_out) > 25
        assert float(torch.cdist(trained, held_out).min()) > 0


def test_muon_makes_steps_orthogonal(script):
    from tiny_wan.muon import Muon, orthogonalised

    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalised(matrices))
    assert 0.6 < float(singular.min()) < float(singular.max()) < 1.3

    target = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    matrix, vector = torch.zeros(8, 12, requires_grad=True), torch.zeros(12, requires_grad=True)
    optimiser = Muon([matrix], [vector], rate=0.3, adam_rate=0.05)
    for step in range(60):
        optimiser.set_scale(1 - step / 60)
        optimiser.zero_grad()
        loss = (matrix + vector - target).square().mean()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * float(target.square().mean())


def test_every_share_of_steps_and_grid_has_a_batch(script):
    for preset in script.PRESETS.values():
        for phase in preset.phases:
            assert set(phase.shares) <= set(preset.batches)
            assert sum(phase.shares.values()) == pytest.approx(1)
        assert preset.phases[-1].until == 1
        assert {preset.default_grid, preset.evaluation_grid} <= set(preset.batches)
        assert replace(preset, denoiser_steps=7).shares(0.999) == preset.phases[-1].shares
