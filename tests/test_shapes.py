"""Shapes of a model: the file beside its weights, and what the command line makes of it."""

import json

import pytest

from visattn.cli import main
from visattn.cli.generation_options import add_job_arguments, add_model_arguments, job_fields
from visattn.generation import read_shapes, shape_of
from visattn.generation.prompts import model_prompts

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
