"""The small model that lies in the checkout: what it holds, that it does as it is told, and what is
said of a damaged one."""

import json
import shutil

import pytest
import torch
from support.cli import ROOT, good, refused

from visattn.generation import default_model, read_shapes, shape_of
from visattn.generation.checksums import check_checksums
from visattn.inject import observe
from visattn.media.video import read_video
from visattn.metrics.prompt import score_prompt
from visattn.readout import Sampler

MODEL = ROOT / "assets" / "models" / "tiny-wan"
# a held-out caption and a seed with which the model does as it is told
PAIR = ("a blue zero moves left over the fog", 1012)
TILE = 16
FEW = 8


@pytest.fixture
def pipe():
    from diffusers import WanPipeline

    own = WanPipeline.from_pretrained(MODEL)
    own.set_progress_bar_config(disable=True)
    return own


@pytest.fixture
def here(alone, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return alone


def test_model_is_what_the_card_says():
    assert default_model() == str(MODEL)
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 30e6
    check_checksums(MODEL)
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    card = (MODEL / "README.md").read_text()
    for words in ("trained", "seed", "Held out", "can't do", "| evaluation |", "| default |"):
        assert words in card
    shapes = read_shapes(MODEL)
    assert set(shapes) == {"default", "evaluation"}
    tokens = [
        ((s["num_frames"] - 1) // 4 + 1) * (s["height"] // 8) * (s["width"] // 8)
        for s in (shapes["default"], shapes["evaluation"])
    ]
    assert tokens == [2304, 1008]


def test_video_shows_what_the_prompt_says(here, capsys):
    """Without --model, at the evaluation shape; a caption that was never trained on."""
    prompt, seed = PAIR
    out = good(capsys, "generate", prompt, "--shape", "evaluation", "--seed", str(seed), "-o", "v")
    assert "25 frames of 96x96" in out
    frames = read_video("v")
    assert frames.shape == (25, 96, 96, 3)
    score = score_prompt(frames.movedim(3, 1), prompt)
    assert (score.colour, score.object, score.direction, score.background) == (1, 1, 1, 1)


def test_heads_have_structure(pipe):
    """Heads that keep 90 % of their mass in 30 % of the tiles, as the card counts them."""
    sampler = Sampler(passes=["cond"], tile_size=TILE)
    shape = {**shape_of(MODEL, "evaluation"), "num_inference_steps": 4}
    with observe(pipe, sampler):
        generator = torch.Generator().manual_seed(0)
        pipe(PAIR[0], generator=generator, output_type="latent", **shape)
    heads = sampler.table()
    assert len(heads) == 24
    assert sum(head.shares.tile_share <= 0.3 for head in heads) >= FEW


@pytest.fixture
def damaged(here):
    copy = here / "copy"
    shutil.copytree(MODEL, copy)
    return copy


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("how", ["cut short", "altered", "gone"])
def test_damaged_model_is_refused_in_a_sentence(damaged, capsys, name, how):
    file = next((damaged / name).glob("*.safetensors"))
    if how == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if how == "altered" else content[: len(content) // 2])
    lines = refused(capsys, "generate", "a red square", "--model", str(damaged), "-o", "v.mp4")
    words = "lacks the file" if how == "gone" else "is damaged or changed"
    assert len(lines) == 1 and words in lines[0] and file.name in lines[0]


def test_without_the_model_the_message_says_what_to_do(here, capsys, monkeypatch):
    monkeypatch.setattr("visattn.generation.loading.SMALL_MODEL", here / "nothing")
    for argv in (["generate", "a red square"], ["inspect", "a red square"],
                 ["compare", "a red square", "--plan-b", "dense"]):
        [line] = refused(capsys, *argv)
        assert "no --model is given" in line and "assets/models/tiny-wan" in line
