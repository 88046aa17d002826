"""Plan files that are damaged or hostile: each is a plan still, or is refused in one line that
names the file; none runs code."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn import Grid, TokenLayout
from visattn.patterns import Dense, Diagonal, Neighborhood, Radial, Skip, Stencil, Stripe, Union
from visattn.patterns.base.head_pattern import KINDS
from visattn.patterns.grammar.call_grammar import signature_of
from visattn.patterns.grammar.parse import parse_pattern
from visattn.plan import Denoiser, Plan, Rule
from visattn.plan.show.plan_view import view_plan
from visattn.plan.show.terminal import plan_text
from visattn.selectors import OnlineChoice, Reuse, TopBlocks

LAYER = "blocks.1.attn1"
PLAN = Plan(
    rules=(
        Rule(Radial(0.2, sink=True)),
        Rule((Dense(), Diagonal(5), Skip(), Neighborhood((0.5, 3, 1.0))), LAYER, phase=1),
        Rule(Union(Diagonal(1), Stripe(columns=(0, (0.25, 0.5)))), pass_="uncond"),
        Rule(Stencil((1, 2, 2), ((0, 0, 0), (-1, 0, 1)), (0,)), role="transformer"),
        Rule(Reuse(TopBlocks(0.25), every=4), phase=0),
        Rule(OnlineChoice(), "blocks.2.attn1"),
    ),
    dense_layers=(0, -1),
    dense_steps=(2, 0.25),
    phases=(0.25, 0.5),
    geometry=TokenLayout(Grid(3, 6, 4), text_before=10),
    model="some/model",
    denoisers={"transformer": Denoiser("WanTransformer3DModel", 3, 4)},
    evidence={"psnr": [31.5, None], "heads": {"a": {"b": [1, 2]}}},
    provenance={"kind": "search", "seed": 1},
)
TEXT = PLAN.to_json()
VALUE = json.loads(TEXT)
WHAT_RUNS = ("exec", "import", "os.", "subprocess.", "socket.", "ctypes.", "marshal.", "pickle.")
FINE = ("os.listdir", "os.scandir")
CHECKED = settings(max_examples=120, deadline=None, derandomize=True)

seen: list[str] = []
watching = False


def hook(event, args):
    if watching and event.startswith(WHAT_RUNS) and event not in FINE:
        seen.append(f"{event} {args!r:.80}")


sys.addaudithook(hook)


def check_sentence(error, words=""):
    """One line, not long, that holds some words."""
    assert_one_line(error)
    assert words in str(error)
    assert 10 < len(str(error)) < 900


def assert_one_line(error):
    assert "\n" not in str(error)


def check_shown(plan):
    """What is shown of a plan is lines of plain text."""
    shown = plan_text(view_plan(plan))
    assert all(line.isprintable() for line in shown.splitlines())


def read(data, folder):
    """What becomes of a file: the plan, or None where it is refused as it should be."""
    global watching
    file = Path(folder, "damaged.json")
    file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    seen.clear()
    watching = True
    try:
        plan = Plan.from_pretrained(file)
    except (ValueError, TypeError) as error:
        check_sentence(error, "damaged.json")
        return None
    finally:
        watching = False
        assert not seen
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    return plan


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        assert read(TEXT, name) == PLAN  # all that reading needs is loaded
        yield name


def test_code_that_runs_is_seen(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "watching", True)
    exec("1")
    assert seen
    seen.clear()


@given(st.data())
@CHECKED
def test_bytes_that_changed(folder, data):
    text = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        what = data.draw(st.sampled_from(["flip", "set", "insert", "cut", "drop", "swap"]))
        if what == "flip":
            text[place] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "set":
            text[place] = data.draw(st.sampled_from(b'0123456789-.eE"{}[],:nNtf \n\x00\xff'))
        elif what == "insert":
            text[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        elif what == "cut":
            del text[place:]
        elif what == "drop":
            del text[place : place + data.draw(st.integers(1, 40))]
        else:
            other = data.draw(st.integers(0, len(text) - 1))
            text[place], text[other] = text[other], text[place]
        if not text:
            break
    plan = read(bytes(text), folder)
    if plan is not None:
        check_shown(plan)


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


PATHS = list(places(VALUE))[1:]
numbers = st.sampled_from([0, 1, -1, 2**31, -(2**63), 10**400, 10**3999, 0.5, -0.0, 1e308, 1e-320])
words = st.sampled_from(["", "any", "a\nb", "\x1b[2J", "\ud800", "x" * 5000, "transformer", "cond"])
leaves = numbers | words | st.booleans() | st.none()
deep = st.integers(1, 60).map(lambda n: json.loads("[" * n + "]" * n))
anything = (
    leaves
    | deep
    | st.lists(leaves, max_size=3)
    | st.dictionaries(words, leaves, max_size=3)
    | st.sampled_from([VALUE[key] for key in VALUE])
)


@given(st.lists(st.sampled_from(PATHS), min_size=1, max_size=2), st.data())
@CHECKED
def test_values_that_changed(folder, paths, data):
    value = json.loads(TEXT)
    for path in paths:
        own = value
        try:
            for key in path[:-1]:
                own = own[key]
            own[path[-1]]
        except (LookupError, TypeError):
            continue  # the first change took it away
        if isinstance(own, str):
            continue  # or put a word there
        what = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if what == "replace":
            own[path[-1]] = data.draw(anything)
        elif what == "delete":
            del own[path[-1]]
        elif isinstance(own, dict):
            own[data.draw(words)] = data.draw(anything)
        else:
            own.append(data.draw(anything))
    plan = read(json.dumps(value), folder)
    if plan is not None:
        check_shown(plan)


LONG = {
    "many keys": json.dumps({"schema": VALUE["schema"], **{str(n): 0 for n in range(200_000)}}),
    "long key": json.dumps({"schema": VALUE["schema"], "x" * (1 << 22): 0}),
    "long key twice": f'{{"{"x" * (1 << 20)}": 0, "{"x" * (1 << 20)}": 0}}',
    "long text": json.dumps(VALUE | {"schema": "x" * (1 << 22)}),
    "long role": json.dumps(VALUE | {"rules": [{"pattern": 0, "role": "x" * (1 << 20)}]}),
    "long digits": TEXT.replace("31.5", "9" * 5000),
    "large number": TEXT.replace("31.5", "1e999"),
    "many phases": json.dumps(VALUE | {"phases": [n / 10_001 for n in range(1, 10_000)]}),
    "many rules": json.dumps(VALUE | {"rules": [{"pattern": 0}] * 70_000}),
    "many patterns": json.dumps(VALUE | {"patterns": ["Dense()"] * 20_000}),
    "many named layers": json.dumps(
        VALUE | {"rules": [{"pattern": 0, "layer": str(n)} for n in range(2000)]}
    ),
    "many heads of a rule": json.dumps(VALUE | {"rules": [{"heads": [0] * 2000}]}),
    "many empty lists": json.dumps(VALUE | {"evidence": {"a": [[]] * 5_000_000}}),
    "many dense layers": json.dumps(VALUE | {"dense_layers": [0] * 3000}),
    "many layers": json.dumps(VALUE | {"dense_layers": [10**3000]}),
    "many steps": json.dumps(VALUE | {"dense_steps": [10**3000, 0]}),
    "many tokens": json.dumps(VALUE | {"geometry": [["grid", 10**9, 10**9, 10**9]]}),
    "many heads": TEXT.replace('"heads": 4', f'"heads": {10**3000}'),
    "far pattern": json.dumps(VALUE | {"rules": [{"pattern": 10**3000}]}),
    "late phase": json.dumps(VALUE | {"rules": [{"pattern": 0, "phase": 10**3000}]}),
    "deep": TEXT.replace("31.5", "[" * 100 + "]" * 100),
    "deeper than Python": TEXT.replace("31.5", "[" * 100_000 + "]" * 100_000),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_what_is_too_long_is_refused(text, folder):
    assert read(text, folder) is None


@pytest.mark.parametrize("key", VALUE)
def test_key_that_stands_twice(key, folder):
    assert read(TEXT.replace("{", f'{{"{key}": {json.dumps(VALUE[key])},', 1), folder) is None


@pytest.mark.parametrize("key", sorted(set(VALUE) - {"schema", "patterns"}))
def test_key_that_is_missing_has_its_default(key, folder):
    value = {name: own for name, own in VALUE.items() if name != key}
    plan = read(json.dumps(value), folder)
    needs = {"phases"}  # rules name the second one
    assert (plan is None) == (key in needs)


CODE = (
    "__import__('os').system('touch owned')",
    "exec('import os')",
    "eval('1')",
    "().__class__.__bases__[0].__subclasses__()",
    "radial.__class__",
    "radial().__init__.__globals__",
    "[radial() for x in (1,)]",
    "(lambda: radial())()",
    "radial(decay:=1)",
    "f'{radial()}'",
    "radial(*(1,))",
    "radial(**{'decay': 1})",
    "radial(decay=(lambda: 1)())",
    "radial(decay=__import__('math').pi)",
    "radial(decay=open('/etc/passwd'))",
    "diagonal(10**10**10)",
    "diagonal(1 << 10**10)",
    "diagonal((1,) * 10**9)",
    "diagonal('a' * 10**9)",
    "diagonal(9" + "9" * 9000 + ")",
    "diagonal(" + "-" * 9000 + "1)",
    "diagonal(" + "(" * 9000 + ")" * 9000 + ")",
    "diagonal(1" + "+1" * 4000 + ")",
    "diagonal(" + "not " * 2000 + "1)",
    "radial" + "()" * 4000,
    "radial" + ".x" * 4000,
    "radial" + "[0]" * 3000,
    "diagonal(" + "lambda:" * 1000 + "1)",
    "axis_order(" * 50 + "skip" + ")" * 50,
    "register_gate('x', print)",
    "Plan()",
    "HeadPattern()",
    "object()",
    "radial()\nimport os",
    "radial();import os",
    "radial() # \x00",
    "x" * 300_000,
)


@pytest.mark.parametrize("text", CODE, ids=range(len(CODE)))
def test_patterns_that_would_run_code_or_grow(text, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read(json.dumps(VALUE | {"patterns": [text] * 9}), folder) is None
    assert list(tmp_path.iterdir()) == []


NESTED = (
    "diagonal(" + "(" * 150 + "1" + ")" * 150 + ")",
    "diagonal(" + "- " * 3000 + "1)",
    "diagonal(" + "not " * 2000 + "1)",
    "diagonal(1" + "**1" * 3000 + ")",
    "diagonal(" + "lambda:" * 1000 + "1)",
)


@pytest.mark.parametrize("text", NESTED, ids=range(len(NESTED)))
def test_deep_text_never_reaches_the_parser_of_python(text, monkeypatch):
    """It ended the process in a thread with a stack of 256 KiB."""

    def parse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("visattn.patterns.grammar.call_grammar.ast.parse", parse)
    with pytest.raises(ValueError, match="is no call with literal arguments"):
        parse_pattern(text)


WORDS = (
    "radial diagonal union stencil TopBlocks __class__ lambda import ( ) , = - . * ** [ ] { } : := "
    "' \" 1 0.5 1e999 2**9 True None decay rule 'block' x # not if else @ ` \\"
)
tokens = st.sampled_from([*WORDS.split(), " ", "\n"])


@given(st.lists(tokens, min_size=1, max_size=25).map("".join))
@CHECKED
def test_any_pattern_text_is_a_pattern_or_refused(folder, text):
    plan = read(json.dumps(VALUE | {"patterns": [text] * 9}), folder)
    if plan is not None:
        assert parse_pattern(text) == plan.rules[0].patterns


EXTREME = [2**63 - 1, -(2**63) + 1, 0, 1e308, 5e-324, -0.0, (2**63 - 1,) * 3, ((0, 0, 0),) * 500,
           True, None, "", "x", (), ((),), (1e308,) * 3, Skip(), (Skip(), Radial())]


@pytest.mark.parametrize("name", KINDS)
def test_extreme_arguments_are_refused_or_come_back(name):
    """No argument of any pattern can do more than raise, or make a pattern that its own text gives
    back."""
    kind = KINDS[name]
    parameters = [part.split("=")[0] for part in signature_of(kind).split(", ") if part]
    fields = [part for part in parameters if part.isidentifier()]
    needed = {part: 2 for part in signature_of(kind).split(", ") if part.isidentifier()}
    for field in fields:
        for value in EXTREME:
            try:
                pattern = kind(**(needed | {field: value}))
            except (ValueError, TypeError) as error:
                assert_one_line(error)
            else:
                assert parse_pattern(repr(pattern)) == pattern
