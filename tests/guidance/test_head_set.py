"""Head sets: what a file holds, that a damaged one is refused in a line, and that they guide."""

import json
import random

import pytest
import torch
from support import tiny

from visattn.generation.silence_logs import quiet
from visattn.guidance import PAG, HeadSet, Perturb, SoftPAG, guide
from visattn.guidance.head_set import HEADS_FILE, SCHEMA

SET = HeadSet(
    {"blocks.2.attn1": {1: 1.0, 3: 0.25}, "blocks.0.attn1": {0: 1.0, 2: 1.0}},
    model="WanTransformer3DModel",
    provenance={"kind": "searched", "rounds": [{"added": [["blocks.2.attn1", 1, 0.5]]}]},
    strength=0.5,
    scale=2.0,
    policy="image_rows",
    target="uniform",
    objective="mine:aesthetic",
    size=(3, 4),
)
TEXT = SET.to_json()
VALUE = json.loads(TEXT)


def read(value):
    return HeadSet.from_json(value if isinstance(value, str) else json.dumps(value))


def test_json_holds_all_of_a_set():
    assert read(TEXT) == SET
    assert VALUE["schema"] == SCHEMA
    assert VALUE["layers"] == {"blocks.0.attn1": [0, 2], "blocks.2.attn1": {"1": 1.0, "3": 0.25}}
    assert list(VALUE) == sorted(VALUE)
    assert '    "blocks.0.attn1": [0, 2],\n' in TEXT  # a layer on a line
    assert read({"schema": SCHEMA, "layers": {"a": [1]}}) == HeadSet.of([("a", 1)])
    assert read(HeadSet({}).to_json()) == HeadSet({})


def test_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "heads.json"
    SET.save(path)
    assert HeadSet.load(path) == HeadSet.from_pretrained(path) == SET
    assert [own.name for own in tmp_path.iterdir()] == ["heads.json"]
    SET.save_pretrained(tmp_path / "folder")
    assert HeadSet.from_pretrained(tmp_path / "folder") == SET
    assert (tmp_path / "folder" / HEADS_FILE).read_text() == TEXT
    with pytest.raises(OSError, match="no-such"):
        HeadSet.load(tmp_path / "no-such.json")
    with pytest.raises(OSError, match=r"holds no visattn_heads\.json"):
        HeadSet.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="head set 'user/no-such' is no file, and the hub gave none"):
        HeadSet.from_pretrained("user/no-such")
    with pytest.raises(OSError, match="no-folder"):
        SET.save(tmp_path / "no-folder" / "heads.json")


BAD = {
    "newer": (VALUE | {"schema": "visattn.heads/2"}, "has the schema 'visattn.heads/2'"),
    "a plan": ({"schema": "visattn.plan/1", "rules": []}, "has the schema 'visattn.plan/1'"),
    "no layers": ({"schema": SCHEMA}, "lacks the key 'layers'"),
    "unknown key": (VALUE | {"layer": {}}, "unknown key 'layer', did you mean 'layers'"),
    "list": (VALUE | {"layers": ["a"]}, "must be an object"),
    "layer": (VALUE | {"layers": {"a": 3}}, "layer 'a' of .* is 3"),
    "head text": (VALUE | {"layers": {"a": ["1"]}}, "heads are numbers"),
    "head bool": (VALUE | {"layers": {"a": [True]}}, "heads are numbers"),
    "head twice": (VALUE | {"layers": {"a": [1, 1]}}, "names a head twice"),
    "head negative": (VALUE | {"layers": {"a": [-1]}}, "head -1"),
    "head huge": (VALUE | {"layers": {"a": [10**30]}}, "below 1024"),
    "head name": (VALUE | {"layers": {"a": {"one": 1}}}, "names the head 'one'"),
    "strength": (VALUE | {"layers": {"a": {"1": 2}}}, "strength from 0 to 1"),
    "strength text": (VALUE | {"layers": {"a": {"1": "1"}}}, "strength from 0 to 1"),
    "strength of all": (VALUE | {"strength": 1.5}, "strength=1.5"),
    "scale": (VALUE | {"scale": "3"}, "scale='3'"),
    "policy": (VALUE | {"policy": 3}, "policy of .* is 3"),
    "size": (VALUE | {"size": [3]}, "size="),
    "size zero": (VALUE | {"size": [0, 4]}, "size="),
    "size text": (VALUE | {"size": "3x4"}, "size of .* is '3x4'"),
    "provenance": (VALUE | {"provenance": []}, "provenance"),
    "empty": (" \n", "is empty; a head set is a JSON object"),
    "no json": ("heads", "is not JSON"),
    "nan": (TEXT.replace("0.25", "NaN"), "NaN"),
    "twice": (TEXT.replace('"model"', '"layers"'), "'layers' twice"),
}


@pytest.mark.parametrize(("value", "words"), BAD.values(), ids=BAD)
def test_damaged_sets_are_refused_in_a_line(tmp_path, value, words):
    path = tmp_path / "heads.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ValueError, match=words) as error:
        HeadSet.load(path)
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    assert "heads.json" in said


def test_bytes_at_random_are_a_set_or_refused(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "heads.json"
    for _ in range(300):
        data = bytearray(TEXT.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
        try:
            own = HeadSet.load(path)
        except ValueError as error:
            said = str(error)
        else:
            said = "heads.json"
            assert read(own.to_json()) == own
        assert "heads.json" in said and "\n" not in said


def test_arguments_are_checked():
    for given, kind, words in [
        ({"layers": [("a", 1)]}, TypeError, "must map paths to heads"),
        ({"layers": {3: {1: 1.0}}}, TypeError, "for 3"),
        ({"layers": {"a": [1]}}, TypeError, "must map paths"),
        ({"layers": {"a": {1: float("nan")}}}, ValueError, "strength from 0 to 1"),
        ({"layers": {}, "scale": float("inf")}, ValueError, "scale=inf"),
        ({"layers": {}, "provenance": {"a": object()}}, ValueError, "JSON values only"),
    ]:
        with pytest.raises(kind, match=words):
            HeadSet(**given)


# ---- guiding by one


def test_guidance_takes_what_the_set_says():
    own = SoftPAG(SET)
    assert (own.strength, own.scale) == (0.5, 2.0)
    assert (own.policy, own.target) == ("image_rows", "uniform")
    assert SoftPAG(SET, 0.25, 7.0, policy="all", target="value") == SoftPAG(
        SET, strength=0.25, scale=7.0, policy="all", target="value"
    )
    usual = SoftPAG(HeadSet.of([("a", 1)]))
    assert (usual.strength, usual.scale, usual.policy, usual.target) == (1.0, 3.0, "all", "value")
    with pytest.raises(ValueError, match="policy='sideways'"):
        SoftPAG(HeadSet(SET.layers, policy="sideways"))


def test_strengths_multiply_in_edits_too():
    edit = Perturb(layers=SET)
    paths = [f"blocks.{n}.attn1" for n in range(3)]
    placed = edit.place(paths, 4).strengths
    assert placed["blocks.2.attn1"].tolist() == [0, 0.5, 0, 0.125]
    assert placed["blocks.0.attn1"].tolist() == [0.5, 0, 0.5, 0]


@pytest.fixture(scope="module")
def pipe():
    with quiet():
        return tiny.wan21()


def test_heads_of_another_model_are_refused(pipe):
    plain = tiny.generate(pipe, steps=1)
    with guide(pipe, SoftPAG(SET, policy="all", target="value")):
        assert not torch.equal(tiny.generate(pipe, steps=1), plain)
    for changed, words in [
        ({"model": "FluxTransformer2DModel", "size": None}, "of FluxTransformer2DModel, and trans"),
        ({"size": (30, 12)}, "WanTransformer3DModel with 30 layers of 12 heads, and trans"),
    ]:
        own = HeadSet(SET.layers, **({"model": SET.model} | changed))
        with (
            pytest.raises(ValueError, match=f"heads are of another model: .*{words}"),
            guide(pipe, [PAG(), SoftPAG(own)]),
        ):
            pass
    assert torch.equal(tiny.generate(pipe, steps=1), plain)
