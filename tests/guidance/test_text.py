"""Guidances in written form: every one is read and written, and what is wrong is named."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from support import tiny

from visattn.generation.silence_logs import quiet
from visattn.guidance import PAG, SEG, HeadSet, Perturb, SkipBlock, SoftPAG
from visattn.guidance.registry import GUIDANCES, guided
from visattn.guidance.written_form import (
    guidance_text,
    listed_guidances,
    parse_guidance,
    parse_guidances,
)


@pytest.mark.parametrize("name", GUIDANCES)
def test_examples_are_read_and_written(name):
    text = GUIDANCES[name].example
    own = parse_guidance(text)
    whole = guidance_text(own)
    assert guidance_text(parse_guidance(whole)) == whole
    assert type(own) is GUIDANCES[name].make
    given = dict(item.split("=") for item in text.partition(":")[2].split(",") if "=" in item)
    assert given and set(given) <= set(GUIDANCES[name].parameters)
    assert whole.startswith(f"{name}:")
    assert all(f"{key}=" in whole for key in given)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("softpag", SoftPAG()),
        (
            "softpag:heads=3:2,5;-1:1@0.5;7:*,strength=0.5,scale=2",
            SoftPAG({3: {2: 1.0, 5: 1.0}, -1: {1: 0.5}, 7: None}, 0.5, 2.0),
        ),
        ("softpag:heads=blocks.3.attn1:0,start=2", SoftPAG({"blocks.3.attn1": {0: 1.0}}, start=2)),
        ("pag:layers=blocks.3.attn1,-2,stop=0.5", PAG(layers=["blocks.3.attn1", -2], stop=0.5)),
        ("seg:sigma=1e-1", SEG(sigma=0.1)),
        ("slg-uncond:blocks=1", SkipBlock(blocks=(1,), passes=("uncond",))),
    ],
)
def test_texts_say_what_they_mean(text, own):
    assert parse_guidance(text) == own


def test_heads_of_a_file_are_written_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = {"blocks.1.attn1": {2: 1.0, 3: 0.5}}
    HeadSet(layers, strength=0.5, scale=2.0, policy="image_rows").save("heads.json")
    own = parse_guidance("softpag:heads=heads.json,scale=4")
    assert (own.strength, own.scale, own.policy) == (0.5, 4.0, "image_rows")
    text = guidance_text(own)
    assert text.startswith("softpag:heads=blocks.1.attn1:2,3@0.5,strength=0.5,policy=image_rows,")
    again = parse_guidance(text)
    assert again.heads == layers
    assert guidance_text(again) == text


BAD = {
    "softpagg": "unknown name 'softpagg', did you mean 'softpag'",
    "": "unknown name ''; names are softpag, pag",
    "softpag:head=3:1": "unknown parameter 'head', did you mean 'heads'",
    "softpag:": "unknown parameter ''; those of softpag are heads",
    "softpag:strength": "unknown parameter 'strength'",
    "softpag:heads=3": "heads='3' of .* must be layers with heads, .*'3' is no file",
    "softpag:heads=3:1@2": "strengths of layer 3 must be from 0 to 1",
    "softpag:heads=3:1;3:2": "layer 3 twice",
    "softpag:heads=3:1,1": "a head of layer 3 twice",
    "softpag:heads=3:1,heads=4:1": "parameter heads twice",
    "softpag:heads=bad.json": "bad.json' is not JSON",
    "softpag:strength=x": "strength='x' of .* must be a finite number",
    "softpag:strength=2": r"SoftPAG\(strength=2.0\) must be from 0 to 1",
    "softpag:scale=nan": "scale='nan' of",
    "softpag:start=-1": "start='-1' of .* must be a step",
    "softpag:stop=1.5": "stop='1.5' of",
    "softpag:policy=text": "must be one of all, image_rows, ii_identity, ii_renorm",
    "pag:layers=3;4": "layers='3;4' of .* must be numbers or paths",
    "slg:blocks=a": "blocks='a' of .* must be numbers of blocks",
    "slg-uncond": "lacks blocks=, as in 'slg-uncond:blocks=10",
    "tpg:share=0": "share=0.0",
    "tpg:seed=0.5": "must be a whole number",
}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("heads")
    with pytest.raises(ValueError, match=words) as error:
        parse_guidance(text)
    assert "\n" not in str(error.value)
    assert repr(text[:30])[:-1] in str(error.value)


def test_several_are_read_and_what_has_no_name_is_refused():
    assert parse_guidances(None) == parse_guidances(()) == ()
    assert parse_guidances("pag:layers=3") == (PAG(layers=[3]),)
    assert parse_guidances(["pag", SEG()]) == (PAG(), SEG())
    for own in (Perturb(), SkipBlock(blocks=1), SkipBlock(blocks=1, passes=("cond",)), 3):
        with pytest.raises(TypeError, match="must be a guidance that has a name: softpag, pag"):
            parse_guidances([own])
    with pytest.raises(TypeError, match="guidance=3"):
        parse_guidance(3)


def test_list_says_what_every_name_does():
    found = listed_guidances()
    assert [own["name"] for own in found] == list(GUIDANCES)
    for own in found:
        assert own["summary"] and own["example"].startswith(own["name"])
        assert all(own["parameters"].values())


def test_skipping_in_the_unconditional_pass_costs_no_further_one(monkeypatch):
    forward, calls = WanTransformer3DModel.forward, []

    def counted(self, *args, **options):
        calls.append(self.__dict__.get("_visattn") and self._visattn.context.name)
        return forward(self, *args, **options)

    with quiet():
        pipe = tiny.wan21()
    plain = tiny.generate(pipe, steps=2)
    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    guidances = parse_guidances(["slg-uncond:blocks=1", "cfg-zero-star:zero_init=0"])
    with guided(pipe, guidances[:1]):
        one = tiny.generate(pipe, steps=2)
    assert calls == ["cond", "uncond"] * 2
    with guided(pipe, guidances):
        both = tiny.generate(pipe, steps=2)
    assert calls == ["cond", "uncond"] * 4
    with guided(pipe, ()):
        assert torch.equal(tiny.generate(pipe, steps=2), plain)
    assert not torch.equal(one, plain) and not torch.equal(one, both)
