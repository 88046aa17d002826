"""``visattn generate --skip-existing``: what is kept is whole, and is of the same model."""

import json
import os
import shutil
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from support.cli import GENERATE, good, refused

pytestmark = pytest.mark.usefixtures("folder")

STILL = [*GENERATE, "--num-frames", "1", "--num-inference-steps", "1"]


def again(capsys, output, *options):
    """``kept`` or ``wrote``."""
    return good(capsys, *STILL, "-o", output, "--skip-existing", *options).split()[0]


def cut(path, size):
    os.truncate(path, size)


def test_damaged_outputs_are_made_anew(capsys):
    for output in ("clip.mp4", "clip.png", "clip"):
        assert again(capsys, output) == "wrote"
        assert again(capsys, output) == "kept"
    for output in ("clip.mp4", "clip.png", "clip/0000.png"):
        for size in (100, 0):
            cut(output, size)
            assert again(capsys, output.split("/")[0]) == "wrote"
            assert Path(output).stat().st_size > 100
    Path("clip/0000.png").rename("clip/0001.png")
    assert again(capsys, "clip") == "wrote"
    assert again(capsys, "clip") == "kept"


def test_damaged_records_are_made_anew(capsys):
    good(capsys, *STILL, "-o", "clip.png")
    record = Path("clip.png.json")
    whole = record.read_bytes()
    for damaged in (b"", whole[:5], whole[:100], bytes(len(whole)), whole[:40] + bytes(4000)):
        record.write_bytes(damaged)
        assert again(capsys, "clip.png") == "wrote"
        assert again(capsys, "clip.png") == "kept"
    value = json.loads(whole)
    for change in ({"output": None}, {"output": {}}, {"output": {"sha256": None}}, {"job": []}):
        record.write_text(json.dumps(value | change))
        assert again(capsys, "clip.png") == "wrote"
    record.write_bytes(damaged)
    good(capsys, *STILL, "-o", "clip.png")  # also without --skip-existing


@pytest.mark.parametrize("text", ['{"mine": 1}', "mine", "[]", "{}", '{\n  "backend": 1}'])
def test_other_files_are_no_records(capsys, text):
    Path("clip.png.json").write_text(text)
    for options in ((), ("--skip-existing",)):
        (line,) = refused(capsys, *STILL, "-o", "clip.png", *options)
        assert "'clip.png.json' exists and is no record of visattn" in line
    assert Path("clip.png.json").read_text() == text


def test_other_weights_under_the_same_name(capsys, models, monkeypatch):
    shutil.copytree(models / "wan21", "own")
    options = ("--model", "own")
    assert again(capsys, "clip.png", *options) == "wrote"
    weights = Path("own/transformer/diffusion_pytorch_model.safetensors")
    os.utime(weights, (0, 0))  # a copy has another time
    Path("own/README.md").write_text("about it")
    assert again(capsys, "clip.png", *options) == "kept"
    tensors = load_file(weights)
    tensors["scale_shift_table"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert again(capsys, "clip.png", *options) == "wrote"
    assert again(capsys, "clip.png", *options) == "kept"
    config = Path("own/scheduler/scheduler_config.json")
    config.write_text(config.read_text().replace('"flow_shift": 3.0', '"flow_shift": 5.0'))
    assert again(capsys, "clip.png", *options) == "wrote"
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    assert again(capsys, "clip.png", *options) == "wrote"


def test_another_lora_under_the_same_name(capsys, models):
    from visattn.generation.loading import Loading, Lora
    from visattn.generation.origin import origin_of

    loading = Loading("wan", loras=(Lora("lora.safetensors"),))
    model = WanTransformer3DModel.from_pretrained(models / "wan21", subfolder="transformer")
    found = []
    for factor in (1, 1, 2):
        tensors = {"x": factor * model.scale_shift_table.detach()}
        save_file(tensors, "lora.safetensors")
        found.append(origin_of(loading))
    assert found[0] == found[1] != found[2]
    assert found[0]["model"] == found[2]["model"]


def test_a_model_of_a_hub_is_its_commit(tmp_path, monkeypatch):
    from visattn.generation.loading import Loading
    from visattn.generation.origin import origin_of

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert origin_of(Loading("some/model"))["model"] is None
    refs = tmp_path / "hub/models--some--model/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("1234abcd")
    assert origin_of(Loading("some/model"))["model"] == "1234abcd"
    assert origin_of(Loading("some/model", revision="old"))["model"] is None
    (tmp_path / "hub/models--some--model/snapshots/5678").mkdir(parents=True)
    assert origin_of(Loading("some/model", revision="5678"))["model"] == "5678"
