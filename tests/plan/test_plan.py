"""Plans as data: what they say of a call, their JSON, and that wrong files are refused in one
sentence."""

import itertools
import json
import os
import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn import Grid, TokenLayout
from visattn.patterns import Dense, Diagonal, Neighborhood, Radial, Skip, Stencil, Union
from visattn.patterns.base.head_pattern import KINDS
from visattn.plan import ANY, PLAN_FILE, Denoiser, Plan, Rule, read_plan
from visattn.plan.read import as_plan
from visattn.selectors import NABLA, PISA, Agent, Reuse, XAttention

PATTERNS = [Dense(), Skip(), Diagonal(5), Radial(0.2), Neighborhood((0.5, 3, 1.0)),
            Union(Diagonal(1), Skip())]
FULL = Plan(
    rules=(
        Rule(Radial()),
        Rule((Dense(), Diagonal(5), Skip(), Radial(0.2)), "blocks.1.attn1", "transformer", 1,
             "cond"),
    ),
    dense_layers=(0, -1),
    dense_steps=(2, 0.25),
    phases=(0.25, 0.5),
    geometry=TokenLayout(Grid(3, 6, 4), text_before=10),
    model="some/model",
    denoisers={"transformer": Denoiser("WanTransformer3DModel", 3, 4)},
    evidence={"psnr": [31.5, None]},
    provenance={"seed": 1},
)

rules = st.builds(
    Rule,
    st.sampled_from(PATTERNS) | st.lists(st.sampled_from(PATTERNS), min_size=1).map(tuple),
    layer=st.sampled_from([ANY, "blocks.0.attn1", "ü.1"]),
    role=st.sampled_from([ANY, "transformer", "transformer_2", "unet"]),
    phase=st.sampled_from([None, 0]),
    pass_=st.sampled_from([ANY, "cond", "uncond", "perturbed"]),
)
counts = st.integers(0, 9) | st.floats(0, 1)
plans = st.builds(
    Plan,
    rules=st.lists(rules, max_size=4).map(tuple),
    dense_layers=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    dense_steps=st.tuples(counts, counts),
    phases=st.sets(st.floats(0.01, 0.99), max_size=3).map(lambda s: tuple(sorted(s))),
    model=st.none() | st.text(),
    evidence=st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_json_holds_all_of_a_plan(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_json_is_readable():
    lines = FULL.to_json().splitlines()
    assert '  "geometry": [["text", 10], ["grid", 3, 6, 4]],' in lines
    assert '    {"pattern": 0},' in lines
    assert any(line.startswith('    {"heads": [1, 2, 3, 4], "layer": "blocks.1') for line in lines)
    assert Plan.from_json(FULL.to_json()) == FULL


def test_line_differences_can_be_read():
    """A change of one thing is a change of one line."""
    plan = replace(FULL, evidence={"psnr": [31.5, None], "heads": {"b": [1, 2], "a": {}}})
    lines = plan.to_json().splitlines()
    assert lines[lines.index('  "evidence": {') :][:4] == [
        '  "evidence": {',
        '    "heads": {"a": {}, "b": [1, 2]},',
        '    "psnr": [31.5, null]',
        "  },",
    ]
    assert '  "evidence": {},' in replace(plan, evidence={}).to_json().splitlines()
    for changed in (
        replace(plan, evidence={**plan.evidence, "psnr": [32.5, None]}),
        replace(plan, provenance={"seed": 2}),
        replace(plan, model="other"),
        replace(plan, rules=(*plan.rules[:1], replace(plan.rules[1], layer="blocks.2.attn1"))),
        replace(plan, rules=(Rule(Radial(0.9)), *plan.rules[1:])),
        replace(plan, denoisers={"transformer": Denoiser("WanTransformer3DModel", 3, 5)}),
    ):
        own = changed.to_json().splitlines()
        assert len(own) == len(lines)
        assert sum(a != b for a, b in zip(lines, own, strict=True)) == 1
        assert Plan.from_json(changed.to_json()) == changed


def test_what_is_learned_is_longer_than_what_is_written():
    """A stencil of thousands of offsets is read back; one that no file may hold is not written."""
    offsets = tuple((t, y, x) for t in range(-4, 5) for y in range(-9, 10) for x in range(-9, 10))
    plan = Plan((Rule(Stencil((1, 2, 2), offsets)),))
    assert len(repr(plan.rules[0].patterns)) > 30_000
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=r"characters long; a plan file holds at most 200000"):
        Plan((Rule(Stencil((1, 2, 2), offsets * 6)),)).to_json()


def test_steps_and_phases():
    plan = Plan(dense_steps=(2, 1), phases=(0.25, 0.5))
    assert [plan.phase_at(n, 10) for n in range(10)] == [None, None, 0, 1, 1, 2, 2, 2, 2, None]
    shares = Plan(dense_steps=(0.1, 0.25))
    assert [shares.phase_at(n, 8) for n in range(8)] == [None, *[0] * 5, None, None]
    assert [Plan().phase_at(n, 2) for n in range(2)] == [0, 0]
    assert Plan(dense_steps=(1.0, 0)).phase_at(0, 1) is None


def test_table_of_a_layer():
    layers = ["blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"]
    assert FULL.table("transformer", 0, layers, 4) == {}
    assert FULL.table("transformer", 2, layers, 4) == {}
    table = FULL.table("transformer", 1, layers, 4)
    assert set(table) == {(phase, pass_) for phase in range(3) for pass_ in (ANY, "cond")}
    assert table[0, "cond"] == table[1, ANY] == (Radial(),) * 4
    assert table[1, "cond"] == FULL.rules[1].patterns
    assert FULL.table("transformer_2", 1, layers, 4)[1, "cond"] == (Radial(),) * 4
    assert Plan().table("transformer", 1, layers, 4) == {}
    assert Plan((Rule(Dense()),)).table("transformer", 1, layers, 4) == {}


class Counted(tuple):
    """Counts how often it is gone through."""

    times = 0

    def __iter__(self):
        Counted.times += 1
        return super().__iter__()


def test_last_rule_that_fits_decides_and_rules_are_read_once():
    """Against the definition, for random rules; the tables of a plan go through its rules once."""
    draw = random.Random(0)
    layers = ("a", "b", "c")
    for _ in range(50):
        rules = Counted(
            Rule(
                draw.choice([Diagonal(draw.randint(1, 9)), (Dense(), Diagonal(3))]),
                layer=draw.choice((*layers, ANY)),
                role=draw.choice(("transformer", "transformer_2", ANY)),
                phase=draw.choice((None, 0, 1, 2)),
                pass_=draw.choice((ANY, "cond", "uncond")),
            )
            for _ in range(draw.randint(1, 12))
        )
        plan = Plan(rules, phases=(0.2, 0.6))
        expected = {}
        for number, layer in enumerate(layers):
            for phase, pass_ in itertools.product(range(3), (ANY, *plan.passes)):
                own = [
                    rule.heads * (1 if isinstance(rule.patterns, tuple) else 2)
                    for rule in rules
                    if rule.layer in (layer, ANY)
                    and rule.role in ("transformer", ANY)
                    and rule.phase in (phase, None)
                    and rule.pass_ in (pass_, ANY)
                ]
                expected[number, phase, pass_] = own[-1] if own else (Dense(),) * 2
        Counted.times = 0
        for number in range(3):
            table = plan.table("transformer", number, layers, 2)
            for (other, phase, pass_), heads in expected.items():
                if other == number:
                    assert table.get((phase, pass_), (Dense(),) * 2) == heads
        assert Counted.times == 1


def test_what_is_too_large_is_not_written():
    many = Plan(tuple(Rule(Diagonal(n)) for n in range(1, 20_000)))
    with pytest.raises(ValueError, match="plan has 19999 patterns; at most 16384 are allowed"):
        many.to_json()
    with pytest.raises(ValueError, match=r"plan has \d+ bytes as JSON; at most 16777216"):
        Plan(evidence={"a": "x" * (16 << 20)}).to_json()


def test_folder_holds_a_plan(tmp_path):
    folder = tmp_path / "new" / "folder"
    FULL.save_pretrained(folder)
    assert os.listdir(folder) == [PLAN_FILE]
    for source in (folder, str(folder), folder / PLAN_FILE, str(folder / PLAN_FILE)):
        assert Plan.from_pretrained(source) == FULL
        assert read_plan(source) == FULL
    assert read_plan("auto", model_path=str(folder)) == FULL


def test_what_users_write_for_a_plan(tmp_path):
    assert read_plan("none") is None
    assert read_plan("radial") == read_plan("Radial()") == Plan((Rule(Radial()),))
    assert as_plan(Diagonal(3)) == as_plan("diagonal(3)") == Plan((Rule(Diagonal(3)),))
    assert as_plan(FULL) is FULL
    with pytest.raises(ValueError, match="'radiall'"):
        read_plan("radiall(1)")
    with pytest.raises(OSError, match="no file, no folder and no hub id"):
        read_plan("nothing")
    with pytest.raises(ValueError, match="plan='auto' found no"):
        read_plan("auto", model_path=str(tmp_path))
    with pytest.raises(ValueError, match="plan='auto' needs a model"):
        read_plan("auto")
    with pytest.raises(TypeError, match="must be a Plan, a pattern"):
        as_plan(3)
    with pytest.raises(TypeError, match="remove_plan"):
        as_plan("none")
    with pytest.raises(OSError, match="the hub gave none"):
        read_plan("some/plan")  # HF_HUB_OFFLINE


def test_hub_upload(monkeypatch):
    """What is sent; the hub itself is not reached."""
    import huggingface_hub

    sent = []

    class Api:
        def __init__(self, token):
            sent.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            sent.append((repo_id, private, exist_ok))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
            sent.append((path_or_fileobj, path_in_repo, repo_id, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert FULL.push_to_hub("me/plan", private=True) == "https://hub/commit/1"
    assert sent[1] == ("me/plan", True, True)
    assert sent[2] == (FULL.to_json().encode(), PLAN_FILE, "me/plan", "Upload plan")


def test_a_plan_of_schema_1_means_what_it_meant_then() -> None:
    """Its files hold all parameters of a pattern but those that came later."""
    older = {
        "PISA(keep=0.25, block=64, first_order=True)": PISA(0.25, own=True),
        "NABLA(mass=0.9, window=(3, 3, 3), tile=(1, 8, 8))": NABLA(
            0.9, (3, 3, 3), clamped=True, own=True
        ),
        "Reuse(selector=XAttention(mass=0.8, stride=8, block=128), every=4)": Reuse(
            XAttention(0.8, sink=False, own=True)
        ),
        "Agent(box=(1, 4, 4), second=1.0, shortcut=0.0)": Agent(second=1.0, shortcut=0.0),
        "Diagonal(width=5)": Diagonal(5),
    }
    for text, meant in older.items():
        file = changed(patterns=[text], rules=[{"pattern": 0}], schema="visattn.plan/1")
        plan = Plan.from_json(file)
        assert plan.rules[0].patterns == meant
        assert Plan.from_json(plan.to_json()) == plan
        assert '"visattn.plan/2"' in plan.to_json()
    now = Plan.from_json(changed(patterns=[next(iter(older))], rules=[{"pattern": 0}]))
    assert now.rules[0].patterns == PISA(0.25)
    for kind in KINDS.values():
        assert set(kind.before) <= {own.name for own in fields(kind)}


def changed(**values):
    return json.dumps({**json.loads(FULL.to_json()), **values})


BAD_FILES = {
    "empty": ("", "is empty"),
    "blank": (" \n", "is empty"),
    "not json": ("{plan", "is not JSON: .* at line 1"),
    "truncated": (FULL.to_json()[:-20], "is not JSON"),
    "a list": ("[1]", "holds a list"),
    "a number": ("3", "holds a int"),
    "nested": ("[" * 100_000, "nested too deep|is not JSON"),
    "key twice": ('{"schema": "a", "schema": "b"}', "holds the key 'schema' twice"),
    "nan": ('{"schema": NaN}', "holds NaN"),
    "no schema": ("{}", "has the schema None"),
    "later schema": (changed(schema="visattn.plan/3"), "has the schema 'visattn.plan/3'"),
    "unknown key": (changed(rule=[]), "unknown key 'rule', did you mean 'rules'"),
    "unknown pattern": (changed(patterns=["radiall()"]), "radiall"),
    "unknown parameter": (changed(patterns=["Radial(decoy=1)"]), "did you mean 'decay'"),
    "refused parameter": (changed(patterns=["Radial(decay=-1)"]), "decay"),
    "code": (changed(patterns=["__import__('os').system('x')"]), "patterns of"),
    "pattern no text": (changed(patterns=[3]), "a pattern is a string"),
    "rules no list": (changed(rules={}), "rules of .* must be a list"),
    "rule no object": (changed(rules=[3]), "rule 0 of .* must be an object"),
    "rule of nothing": (changed(rules=[{}]), "one of the keys 'heads' and 'pattern'"),
    "rule of both": (changed(rules=[{"heads": [0], "pattern": 0}]), "one of the keys"),
    "rule with unknown key": (changed(rules=[{"pattern": 0, "passes": 1}]), "unknown key"),
    "pattern number": (changed(rules=[{"pattern": 9}]), "the plan has 5 patterns"),
    "negative pattern number": (changed(rules=[{"pattern": -1}]), "names pattern -1"),
    "pattern true": (changed(rules=[{"pattern": True}]), "must be a number"),
    "no heads": (changed(rules=[{"heads": []}]), "must be a pattern, or a tuple"),
    "unknown role": (changed(rules=[{"pattern": 0, "role": "vae"}]), "role='vae'"),
    "unknown pass": (changed(rules=[{"pattern": 0, "pass": "both"}]), "pass='both'"),
    "phase beyond": (changed(rules=[{"pattern": 0, "phase": 3}]), "below the 3 phases"),
    "phase of words": (changed(rules=[{"pattern": 0, "phase": "a"}]), "phase='a'"),
    "layer a number": (changed(rules=[{"pattern": 0, "layer": 3}]), "layer of rule 0 .* a string"),
    "layers of words": (changed(dense_layers=["0"]), "dense_layers="),
    "layers no list": (changed(dense_layers=3), "dense_layers of"),
    "steps of three": (changed(dense_steps=[1, 2, 3]), "a list of two"),
    "negative steps": (changed(dense_steps=[-1, 0]), "dense_steps="),
    "share beyond 1": (changed(dense_steps=[1.5, 0]), "dense_steps="),
    "phases falling": (changed(phases=[0.5, 0.2]), "phases="),
    "phases of words": (changed(phases=["a"]), "phases="),
    "geometry of words": (changed(geometry=["grid"]), "geometry of"),
    "geometry of zero": (changed(geometry=[["grid", 0, 1, 1]]), "geometry of .*at least 1"),
    "geometry of fractions": (changed(geometry=[["grid", 1.5, 1, 1]]), "geometry of"),
    "unknown denoiser": (changed(denoisers={"vae": {"class": "A", "layers": 1, "heads": 1}}),
                         "role 'vae'"),
    "denoiser without class": (changed(denoisers={"unet": {"layers": 1, "heads": 1}}), "'class'"),
    "denoiser of words": (changed(denoisers={"unet": {"class": "A", "layers": "1", "heads": 1}}),
                          "layers of denoiser"),
    "model a number": (changed(model=3), "model of"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_wrong_file_is_one_sentence(text, message, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        Plan.from_pretrained(file)
    assert "\n" not in str(caught.value)
    assert "plan.json" in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        Plan.from_pretrained(file)
    with file.open("wb") as big:
        big.truncate(65 << 20)
    with pytest.raises(ValueError, match="a plan has at most"):
        Plan.from_pretrained(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        Plan.from_pretrained(tmp_path / "pipe")
    with pytest.raises(OSError, match=f"holds no {PLAN_FILE}"):
        Plan.from_pretrained(tmp_path)


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)
BAD_ARGUMENTS = [
    lambda: Plan([Rule(Dense())]),
    lambda: Plan(("radial",)),
    lambda: Plan(dense_layers=3),
    lambda: Plan(dense_layers=(True,)),
    lambda: Plan(dense_steps=3),
    lambda: Plan(dense_steps=(float("nan"), 0)),
    lambda: Plan(phases=(0.0,)),
    lambda: Plan(phases=(True,)),
    lambda: Plan(geometry=Grid(1, 2, 3)),
    lambda: Plan(evidence={"a": float("inf")}),
    lambda: Plan(evidence={"a": Dense()}),
    lambda: Plan(evidence={1: "a"}),
    lambda: Plan(evidence={"a": {1: 0, "b": 0}}),
    lambda: Plan(evidence=[1]),
    lambda: Plan(provenance={"a": json.loads("[" * 40 + "]" * 40)}),
    lambda: Plan(provenance={"a": CIRCLE}),
    lambda: Plan(dense_layers=(10**9,)),
    lambda: Plan(dense_steps=(10**9, 0)),
    lambda: Plan(phases=tuple(n / 1000 for n in range(1, 200))),
    lambda: Plan((Rule(Dense(), phase=1),)),
    lambda: Plan((Rule(Dense()),) * 70_000),
    lambda: Plan(tuple(Rule(Dense(), layer=str(n)) for n in range(2000))),
    lambda: Rule((Dense(),) * 2000),
    lambda: Rule("radial"),
    lambda: Rule(()),
    lambda: Rule(Dense(), layer=""),
    lambda: Rule(Dense(), phase=True),
]


@pytest.mark.parametrize("make", BAD_ARGUMENTS)
def test_wrong_argument_is_one_sentence(make):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert len(str(caught.value)) > 20
    assert "\n" not in str(caught.value)
