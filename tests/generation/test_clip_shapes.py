"""Shapes of a model: the file beside its weights, and what the command line makes of it."""

import json
import shutil

import pytest
import torch

from visattn.cli import main
from visattn.cli.generation_options import add_job_arguments, add_model_arguments, job_fields
from visattn.cli.search import read_scorer
from visattn.generation import default_model, read_shapes, shape_of
from visattn.generation.prompts import model_prompts
from visattn.metrics.caption_scorer import caption_scorer

SHAPES = {
    "default": {"height": 64, "width": 48, "num_frames": 9, "guidance_scale": 4.0},
    "evaluation": {"num_frames": 5, "num_inference_steps": 3},
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "visattn_shapes.json").write_text(json.dumps(SHAPES))
    (tmp_path / "model_index.json").write_text("{}")
    return str(tmp_path)


def fields(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    add_job_arguments(parser)
    add_model_arguments(parser)
    return job_fields(parser.parse_args(argv))


def test_shapes_of_a_folder(model, tmp_path):
    assert read_shapes(model) == SHAPES
    assert shape_of(model) == SHAPES["default"]
    assert shape_of(model, "evaluation") == SHAPES["evaluation"]
    assert shape_of("user/model") == {} == read_shapes(tmp_path / "nothing")


def test_options_go_before_the_shape_of_the_model(model):
    assert fields("--model", model) == SHAPES["default"]
    assert fields("--model", model, "--width", "80", "--seed", "3") == {
        **SHAPES["default"],
        "width": 80,
        "seed": 3,
    }
    assert fields("--model", model, "--shape", "evaluation") == SHAPES["evaluation"]
    assert fields("--model", "user/model", "--num-frames", "9") == {"num_frames": 9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"default": 3}', "cannot be read"),
        ('{"default": {"prompt": "a"}}', "unknown key 'prompt'"),
        ('{"default": {"height": 0}}', "height=0"),
        ('{"default": {"height": "64"}}', "height='64'"),
        ('{"scorer": 3}', "scorer=3 must be a text"),
    ],
)
def test_broken_shapes_are_refused(model, tmp_path, text, words, capsys):
    (tmp_path / "visattn_shapes.json").write_text(text)
    with pytest.raises(ValueError, match=r"visattn_shapes\.json") as error:
        read_shapes(model)
    assert words in str(error.value)
    assert main(["generate", "a prompt", "--model", model]) == 2
    printed = capsys.readouterr()
    assert not printed.out and words in printed.err and printed.err.count("\n") == 1


def test_shape_that_is_not_there_is_refused(model, capsys):
    assert main(["generate", "a prompt", "--model", model, "--shape", "big"]) == 2
    error = capsys.readouterr().err
    assert "shape 'big' is not one of model" in error and "has default, evaluation" in error
    assert main(["generate", "a prompt", "--model", "user/model", "--shape", "big"]) == 2
    assert "has no visattn_shapes.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"calibration": ["a"]}', '"a"', ""])
def test_broken_prompts_of_a_model_are_refused_with_the_name_of_the_file(tmp_path, text):
    (tmp_path / "visattn_prompts.json").write_text(text)
    with pytest.raises(ValueError, match=r"visattn_prompts\.json"):
        model_prompts(tmp_path)


def test_the_small_model_names_its_scorer_and_others_none(model, tmp_path):
    frames, caption = torch.zeros(5, 64, 64, 3), "a red square moves left over the fog"
    scorer = read_scorer(default_model())
    assert set(scorer(frames, caption)) == {"colour", "object", "direction"}
    assert read_scorer(model) is read_scorer("user/model") is None
    (tmp_path / "visattn_shapes.json").write_text(json.dumps(SHAPES | {"scorer": "captions"}))
    assert read_scorer(model) is scorer
    assert read_shapes(model) == SHAPES
    (tmp_path / "visattn_shapes.json").write_text('{"scorer": "os:system"}')
    with pytest.raises(ValueError, match="names the scorer 'os:system'; it must be captions"):
        read_scorer(model)


@pytest.mark.parametrize("named", [False, True])
def test_search_takes_the_scorer_of_the_model(named, model, tmp_path, monkeypatch):
    if named:
        shutil.copy(f"{default_model()}/visattn_shapes.json", tmp_path)
    taken = []

    def search(*args, scorer, **keywords):
        taken.append(scorer)
        raise ValueError("only the arguments matter")

    monkeypatch.setattr("visattn.cli.search.load_pipeline", lambda loading: None)
    monkeypatch.setattr("visattn.search.search", search)
    assert main(["search", "a", "b", "--model", model, "-o", str(tmp_path / "out")]) != 0
    assert taken == [caption_scorer if named else None]
