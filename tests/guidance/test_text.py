"""Guidances in written form: every one is read and written, and what is wrong is named."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import WanTransformer3DModel
from method_docs.sources import methods_table
from support import tiny
from support.cli import run

import visattn.guidance
from visattn.generation.silence_logs import quiet
from visattn.guidance import (
    NAG,
    PAG,
    SEG,
    Edit,
    Guidance,
    HeadSet,
    Perturb,
    RegionMask,
    SkipBlock,
    SoftPAG,
)
from visattn.guidance.method_list import listed_edits, listed_methods
from visattn.guidance.registry import (
    GRAMMAR,
    GUIDANCES,
    guided,
    listed_guidances,
    parse_guidance,
    parse_guidances,
    present_text,
)
from visattn.guidance.written_form import guidance_text


@pytest.mark.parametrize("name", GUIDANCES)
def test_examples_are_read_and_written(name):
    kind = GUIDANCES[name]
    guidance = parse_guidance(kind.example)
    assert type(guidance) is kind
    whole = guidance_text(guidance)
    assert guidance_text(parse_guidance(whole)) == whole
    assert whole.startswith(f"{name}(")
    arguments = GRAMMAR.read(kind.example).kwargs
    assert arguments and set(arguments) <= set(kind.parameters())
    assert all(f"{key}=" in whole for key in arguments)


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("softpag", SoftPAG()),
        ("SoftPAG()", SoftPAG()),
        (
            "SoftPAG({3: [2, 5], -1: {1: 0.5}, 7: None}, strength=0.5, scale=2)",
            SoftPAG({3: [2, 5], -1: {1: 0.5}, 7: None}, 0.5, 2),
        ),
        ("SoftPAG(heads={'blocks.3.attn1': 0}, start=2)", SoftPAG({"blocks.3.attn1": 0}, start=2)),
        ("PAG(layers=['blocks.3.attn1', -2])", PAG(layers=["blocks.3.attn1", -2])),
        ("seg(sigma=1e-1)", SEG(sigma=0.1)),
        ("SkipBlock(blocks=1, passes='uncond')", SkipBlock(blocks=(1,), passes=("uncond",))),
        ("Perturb(layers=[1], heads={0: 0.5})", Perturb(layers=[1], heads={0: 0.5})),
    ],
)
def test_texts_are_read(text, guidance):
    assert parse_guidance(text) == guidance
    assert parse_guidance(guidance_text(guidance)) == parse_guidance(guidance_text(guidance))


def test_values_are_written_as_their_parameters_have_them():
    assert guidance_text(SoftPAG({3: {2: 1, 5: 1}, 1: {4: 0.5}}, scale=2)) == (
        "SoftPAG(heads={3: [2, 5], 1: {4: 0.5}}, strength=1.0, scale=2.0, policy='all', "
        "target='value', start=0, stop=1.0)"
    )
    text = guidance_text(SkipBlock(blocks=None, start=2))
    assert text.startswith("SkipBlock(blocks=None, start=2")
    assert parse_guidance(guidance_text(NAG("it's (very) \"blurry\" " * 99))).negative_prompt == (
        "it's (very) \"blurry\" " * 99
    )


def test_heads_of_a_file_are_written_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = {"blocks.1.attn1": {2: 1.0, 3: 0.5}}
    HeadSet(layers, strength=0.5, scale=2.0, policy="image_rows").save("heads.json")
    guidance = parse_guidance("SoftPAG(heads='heads.json', scale=4)")
    assert (guidance.strength, guidance.scale, guidance.policy) == (0.5, 4.0, "image_rows")
    text = guidance_text(guidance)
    assert text.startswith(
        "SoftPAG(heads={'blocks.1.attn1': {2: 1.0, 3: 0.5}}, strength=0.5, scale=4.0, "
        "policy='image_rows',"
    )
    again = parse_guidance(text)
    assert again.heads == layers
    assert guidance_text(again) == text


BAD = {
    "SoftPAGG()": "unknown guidance 'SoftPAGG', did you mean 'SoftPAG'",
    "pagg": "unknown guidance 'pagg', did you mean 'PAG'",
    "": "no call with literal arguments; write for example SoftPAG",
    "SoftPAG(head={3: [1]})": "no parameter 'head', did you mean 'heads'",
    "SoftPAG(strength)": "holds 'strength', which is no literal",
    "SoftPAG(strength=open('x'))": "unknown guidance 'open'",
    "SoftPAG(heads='no.json')": "no.json' is no file",
    "SoftPAG(heads=3)": "heads=3.* must be a HeadSet, heads by layer",
    "SoftPAG(heads={3: {1: 2}})": "the strength 2 in layer 3; it must be from 0 to 1",
    "SoftPAG(heads={3: [-1]})": "heads has -1 in layer 3",
    "SoftPAG(heads={3: 'a'})": "heads has 'a' for layer 3",
    "SoftPAG(heads={3: [1], 3: [2]})": "twice",
    "SoftPAG(strength=1, strength=1)": "no call with literal|strength twice",
    "SoftPAG(heads='bad.json')": "bad.json' is not JSON",
    "SoftPAG(strength='x')": r"SoftPAG\(strength='x'\) must be from 0 to 1",
    "SoftPAG(strength=2)": r"SoftPAG\(strength=2\) must be from 0 to 1",
    "SoftPAG(scale=1e999)": "scale=inf",
    "SoftPAG(start=-1)": "must be steps",
    "SoftPAG(stop=1.5)": "has 1.5 for a share of the steps",
    "SoftPAG(policy='text')": "must be all, image_rows, ii_identity or ii_renorm",
    "PAG(layers=3.5)": r"PAG\(layers=3.5\) must be numbers or paths",
    "SLG(blocks='a')": "is 'a'; it must be whole numbers",
    "SkipBlock()": "needs the parameter 'blocks'",
    "TokenPerturbation(share=0)": "share=0",
    "EnhanceVideo(weight=None)": "weight=None",
    "LabelBias()": "unknown guidance 'LabelBias'",
}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("heads")
    with pytest.raises(ValueError, match=words) as error:
        parse_guidance(text)
    assert "\n" not in str(error.value)
    assert repr(text[:30])[:-1] in str(error.value)


FORMER = {
    "pag:": "PAG()",
    "s2": "S2Guidance()",
    "slg-uncond:blocks=10,start=0.2": "SkipBlock(blocks=[10], start=0.2, passes=['uncond'])",
    "softpag:heads=3:2,5;-1:1@0.5;7:*,strength=0.5,scale=2": (
        "SoftPAG(heads={3: [2, 5], -1: {1: 0.5}, 7: None}, strength=0.5, scale=2)"
    ),
    "softpag:heads=my.json,scale=3": "SoftPAG(heads='my.json', scale=3)",
    "softpag:heads=blocks.1.attn1:2,policy=all": (
        "SoftPAG(heads={'blocks.1.attn1': [2]}, policy='all')"
    ),
    "pag:layers=blocks.3.attn1,-2,stop=0.5": "PAG(layers=['blocks.3.attn1', -2], stop=0.5)",
    "nag:negative_prompt=it's blurry, bad,scale=11": (
        'NAG(negative_prompt="it\'s blurry, bad", scale=11)'
    ),
    "cfg-zero-star:zero_init=1": "CFGZeroStar(zero_init=1)",
    "temperature:layers=3,temperature=2": "TemperatureGuidance(layers=[3], temperature=2)",
}


@pytest.mark.parametrize(("text", "present"), FORMER.items(), ids=FORMER)
def test_the_former_form_is_refused_with_the_present_one(text, present):
    with pytest.raises(ValueError, match="has the form of older versions") as error:
        parse_guidance(text)
    assert str(error.value).endswith(f"write {present}")
    if "my.json" not in text:
        assert present_text(text) == guidance_text(parse_guidance(present))
    assert present_text(present) == present


def test_several_are_read_and_what_has_no_text_form_is_refused():
    assert parse_guidances(None) == parse_guidances(()) == ()
    assert parse_guidances("PAG(layers=[3])") == (PAG(layers=[3]),)
    assert parse_guidances(["PAG", SEG()]) == (PAG(), SEG())
    bits = RegionMask(q_bits=torch.ones(1, dtype=torch.int64))
    for value in (bits, 3):
        with pytest.raises(TypeError, match="has no text form; visattn generate --list"):
            parse_guidances([value])
    with pytest.raises(TypeError, match=r"layers=HeadSet.* cannot be written as a text"):
        parse_guidances(Perturb(layers=HeadSet({"a": {0: 1.0}})))
    with pytest.raises(TypeError, match="guidance=3"):
        parse_guidance(3)


def test_list_says_what_every_name_does():
    listed = listed_guidances()
    assert [item["name"] for item in listed] == list(GUIDANCES)
    for item in listed:
        assert item["summary"] and item["example"].startswith(item["name"] + "(")
        assert all(item["parameters"].values()), item


def test_a_class_that_is_defined_anywhere_is_read_and_run(capsys, monkeypatch):
    """One file adds an edit or a guidance: it is read, written, listed, documented and applied with
    no other change than its public name."""

    @dataclass(frozen=True, kw_only=True)
    class Dampen(Edit):
        """Multiply the output by a factor.

        Args:
            factor: what the output is multiplied with.

        Source:
            This project.
        Default:
            own.
        Differences:
            none
        """

        factor: float = 0.5
        stage: ClassVar[str] = "output"
        example: ClassVar[str] = "Dampen(factor=0.25)"

        def apply(self, state, strength):
            self.change(state, "out", state.out * self.factor, strength)

    @dataclass(frozen=True, kw_only=True)
    class DampenedPass(Guidance):
        """Dampen attention in the further pass.

        Source:
            This project.
        Default:
            own.
        Differences:
            none
        """

        factor: float = 0.5
        example: ClassVar[str] = "DampenedPass(factor=0.25, scale=2.0)"

        def edits(self):
            return [Dampen(factor=self.factor)]

    try:
        listed = {item["name"]: item for item in listed_guidances()}
        assert listed["Dampen"]["summary"] == "Multiply the output by a factor"
        assert listed["Dampen"]["parameters"]["factor"] == "what the output is multiplied with"
        edit, guidance = parse_guidances(["dampen(factor=0)", DampenedPass.example])
        assert edit == Dampen(factor=0.0)
        assert guidance == DampenedPass(factor=0.25, scale=2.0)
        for value in (edit, guidance):
            text = guidance_text(value)
            assert text.startswith(f"{type(value).__name__}(") and parse_guidance(text) == value
        with pytest.raises(ValueError, match="no parameter 'factr', did you mean 'factor'"):
            parse_guidance("Dampen(factr=0)")
        code, out, _ = run(capsys, "generate", "--list-guidance")
        assert code == 0
        for kind in (Dampen, DampenedPass):
            line = f"{kind.__name__}: {kind.summary()}\n    --guidance \"{kind.example}\"\n"
            assert line in out
            monkeypatch.setattr(visattn.guidance, kind.__name__, kind, raising=False)
        names = [*visattn.guidance.__all__, "Dampen", "DampenedPass"]
        monkeypatch.setattr(visattn.guidance, "__all__", names)
        assert listed_edits()[-1] is Dampen and listed_methods()[-1] is DampenedPass
        table = methods_table({"Guidance": [DampenedPass], "Edits": [Dampen]})
        assert "| `Dampen` | This project." in table and "| `DampenedPass` |" in table
        with quiet():
            pipe = tiny.wan21()
        plain = tiny.generate(pipe, steps=1)
        for value in (edit, guidance):
            with guided(pipe, [value]):
                assert not torch.equal(tiny.generate(pipe, steps=1), plain)
        for neutral in ("Dampen(factor=1)", "DampenedPass(scale=0)"):
            with guided(pipe, [parse_guidance(neutral)]):
                assert torch.equal(tiny.generate(pipe, steps=1), plain)
    finally:
        Dampen.example = DampenedPass.example = ""
    assert "Dampen" not in GUIDANCES and "DampenedPass" not in GUIDANCES


def test_skipping_in_the_unconditional_pass_costs_no_further_one(monkeypatch):
    forward, calls = WanTransformer3DModel.forward, []

    def counted(self, *args, **options):
        calls.append(self.__dict__.get("_visattn") and self._visattn.context.name)
        return forward(self, *args, **options)

    with quiet():
        pipe = tiny.wan21()
    plain = tiny.generate(pipe, steps=2)
    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    texts = ["SkipBlock(blocks=[1], passes=['uncond'])", "CFGZeroStar(zero_init=0)"]
    guidances = parse_guidances(texts)
    with guided(pipe, guidances[:1]):
        one = tiny.generate(pipe, steps=2)
    assert calls == ["cond", "uncond"] * 2
    with guided(pipe, guidances):
        both = tiny.generate(pipe, steps=2)
    assert calls == ["cond", "uncond"] * 4
    with guided(pipe, ()):
        assert torch.equal(tiny.generate(pipe, steps=2), plain)
    assert not torch.equal(one, plain) and not torch.equal(one, both)
