"""The page as text: one document, nothing to fetch, nothing that a report can break out of."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from support.example import example_report, example_videos

import visattn.report
from visattn.draw.palette import SPARE, contrast, rgb
from visattn.media.mp4_timing import timing_of
from visattn.patterns.base.head_pattern import KINDS
from visattn.report import render_page, write_page
from visattn.report.colors import families_of
from visattn.report.figures import figure, plain
from visattn.report.stencil_figure import stencil_data
from visattn.report.templating import _environment, render

SOURCES = Path(visattn.report.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("clips", "claims", "heads", "front", "table", "speed", "stability", "failures", "notes",
         "time", "command", "plan")
LEAST = {"schema": "visattn.report/1", "kind": "compare", "title": "two plans"}
EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)>"\' & {} \u2028'


class Page(HTMLParser):
    """Elements, ids and texts of a document."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside, self.text, self.scripts = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.text).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def text():
    return render_page(example_report())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_one_document(text, page):
    assert text.startswith("<!DOCTYPE html>\n<html lang=") and text.endswith("</html>\n")
    for tag in ("html", "head", "body", "main", "h1", "title", "style"):
        assert len(page.all(tag)) == 1, tag
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_policy_lets_nothing_be_fetched(page):
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert (rules["img-src"], rules["media-src"]) == ("data:", "data: blob:")
    _, script = page.scripts  # as a browser hashes the text of an element
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'" and "\r" not in script


def test_no_script_stands_in_an_attribute(page):
    """The policy would not run it."""
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]


def test_page_names_no_resource_outside(text, page):
    assert not re.search(r"https?:", text)
    for _, attributes in page.elements:
        for name in ("src", "href", "poster", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.[cj]s*")), ids=lambda path: path.name)
def test_styles_and_scripts_fetch_nothing(path):
    code = path.read_text(encoding="utf-8")
    assert re.findall(r"//\w|@import|url\(|\bfetch\b|XMLHttp|WebSocket|import\(|\beval", code) == []
    assert "</script" not in code and "</style" not in code


def test_package_takes_styles_and_scripts_along():
    kinds = {path.suffix for path in SOURCES.iterdir() if path.is_file()} - {".py"}
    assert {path.suffix for path in (SOURCES / "templates").iterdir()} == {".j2"}
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r'^"visattn\.report" = \[(.*)\]$', config, re.MULTILINE)
    folders = {f'"*{kind}"' for kind in kinds} | {'"templates/*.j2"'}
    assert folders == set(line.split(", ")) == {'"*.css"', '"*.js"', '"templates/*.j2"'}


def test_ids_are_unique_and_references_resolve(page):
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.elements:
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name, "main") in page.ids
        if tag in ("a", "use") and attributes["href"].startswith("#"):
            assert attributes["href"][1:] in page.ids


def test_controls_have_names(page):
    for tag, attributes in page.elements:
        if tag in ("video", "select", "pre") or attributes.get("type") == "range":
            assert attributes.get("aria-label"), (tag, attributes)
        if attributes.get("role") in ("region", "group", "img"):
            assert attributes.get("aria-label"), (tag, attributes)
    assert len(page.all("legend")) == len(page.all("fieldset"))
    assert all("scope" in attributes for attributes in page.all("th"))


def test_every_part_is_there(page):
    ids = {attributes["id"] for attributes in page.all("section")}
    assert ids == {*PARTS, "setup"} and "headline" in page.ids
    words = "".join(page.text)
    for word in ("1.35x", "does not hold", "not decided", "1 part failed", "0.83", "chance 0.25",
                 "2 of 4 claims hold, 1 does not, 1 is not decided.", "visattn search --model"):
        assert word in words, word


@pytest.mark.parametrize("part", PARTS)
def test_part_without_data_is_left_out(part):
    report = example_report(layers=2, phases=1)
    for nothing in (None, type(report[part])()):
        report[part] = nothing
        page = Page(render_page(report))
        ids = {attributes["id"] for attributes in page.all("section")}
        assert ids == {*PARTS, "setup"} - {part}
        assert f"#{part}" not in {attributes["href"] for attributes in page.all("a")}


def test_least_report_is_a_page():
    page = Page(render_page(LEAST))
    assert page.all("section") == [] and "two plans" in "".join(page.text)
    assert page.data == {"heads": [], "stencils": [], "front": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "visattn.report/2"}, "schema 'visattn.report/2'"),
        ({"schema": None}, "schema None"),
        ({"kind": "bench"}, "kind 'bench'; it must be 'search' or 'compare'"),
        ({"title": ""}, "title ''"),
        ({"clips": [{"dense": "no base64!"}]}, r"clips\[0\].dense must be an mp4 in base64"),
        ({"stencils": [{"count": [1, 1, 1], "mass": [[[1, 2]]]}]}, r"shape \[1, 1, 2\] must be"),
        ({"stencils": [{"count": [1, 1, 1], "mass": [[1], 2]}]}, "lists of equal length"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, change, words):
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(ValueError, match=words) as caught:
        write_page({**LEAST, **change}, path)
    assert "\n" not in str(caught.value)
    assert [path.read_text(), *tmp_path.iterdir()] == ["before", path]


def test_page_is_written_as_it_is_rendered(tmp_path):
    path = tmp_path / "page.html"
    write_page(LEAST, path)
    assert path.read_bytes() == render_page(LEAST).encode()


def test_nothing_in_a_report_becomes_markup():
    def spoil(value, key=""):
        if isinstance(value, dict):
            return {k: spoil(part, k) for k, part in value.items()}
        if isinstance(value, list):
            return [spoil(part, key) for part in value]
        return EVIL if isinstance(value, str) and key not in ("schema", "kind") else value

    report = spoil(example_report(layers=2))
    report["kind"], report["settings"], report["machine"] = "search", {EVIL: EVIL}, {EVIL: EVIL}
    report["front"][0]["kind"] = report["table"][0]["kind"] = EVIL
    fair, spoiled = Page(render_page(example_report(layers=2))), Page(render_page(report))
    tags = ("script", "img", "style", "video", "svg", "iframe")
    count = {tag: len(fair.all(tag)) for tag in tags}
    count["svg"] += 1  # the mark of a kind that is not known
    assert {tag: len(spoiled.all(tag)) for tag in count} == count
    assert not any(name.startswith("on") for _, a in spoiled.elements for name in a)
    assert spoiled.data["heads"][0]["layer"] == EVIL
    assert not re.search("[<>&\u2028]", spoiled.scripts[0])
    assert any(EVIL in text for text in spoiled.text)


def test_numbers_that_are_none_are_dashes_and_never_nan():
    report = example_report(layers=1, phases=1)
    for row in report["heads"] + report["front"] + report["table"] + report["speed"]:
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float("nan") if key in ("density", "executed") else None
    page = Page(render_page(report))
    assert page.data["heads"][0]["density"] is None
    assert "–" in page.text
    assert not re.search(r"\b(NaN|nan|inf|None|null)\b", " ".join(page.text))


def test_many_heads_stay_small():
    report = example_report(layers=40, heads=40)
    text = render_page(report)
    assert text.count(' data-i="') == 3200
    plan = len(base64.b64encode(json.dumps(report["plan"], indent=2).encode()))
    assert len(text) - plan < 6e6


def test_stencil_maps_are_bytes_on_a_logarithmic_scale():
    mass = [[[0.5, 0.05, 0.005], [0.0005, 0.0, 0.5], [0.5, 0.5, 0.5]]]
    (packed,) = stencil_data([{"count": [1, 2, 2], "tile": [1, 4, 4], "mass": mass}])
    assert (packed["mass"]["shape"], packed["mass"]["peak"]) == ([1, 3, 3], 0.5)
    levels = list(base64.b64decode(packed["mass"]["levels"]))
    assert levels == [255, 128, 1, 1, 0, 255, 255, 255, 255]
    assert packed["attention"] is None


def test_long_patterns_are_cut_and_the_plan_is_whole(page):
    report = example_report()
    assert max(len(head["pattern"]) for head in page.data["heads"]) < 300
    (link,) = (a for a in page.all("a") if a.get("id") == "plan-file")
    assert link["download"] == "visattn_plan.json"
    assert json.loads(base64.b64decode(link["href"].split(",")[1])) == report["plan"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0.0, "0"), (0.012345, "0.0123"), (31.24, "31.2"),
     (1234.5, "1234"), (-0.5, "−0.500"), (0.00001, "1.0e−05"), (12, "12"), (True, "yes"),
     ("1.35x", "1.35x")],
)
def test_figure(value, text):
    assert figure(value) == text


def test_small_writing():
    assert figure(1.5, " dB", 1) == "1.5 dB" and figure(None, " dB") == "–"
    assert plain({"a": [1, 2.5], "b": None}) == "a 1, 2.5, b –"


def test_intervals_are_in_small_type():
    macros = _environment().get_template("macros.html.j2").module
    assert macros.interval(None, 1) == "" == macros.interval(1, None)
    assert macros.interval(-1.0, 2.0, 1) == " <small>[−1.0, 2.0]</small>"


def test_templates_escape_text_and_refuse_values_that_are_missing():
    assert render("command", command="<&").endswith("<code>&lt;&amp;</code></pre>")
    assert "<b>&lt;</b>" in render("notes", notes=[Markup("<b>{}</b>").format("<")])
    with pytest.raises(UndefinedError, match="notes"):
        render("notes", other=[])


def test_no_template_turns_escaping_off():
    for path in (SOURCES / "templates").iterdir():
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape", code), path.name


def test_families_have_fixed_colours_and_letters_of_their_own():
    colors = {name: kind.color for name, kind in KINDS.items()}
    found = families_of([*colors, "made up", "made_up_too", ""])
    letters = [family.letters for family in found]
    assert len(set(letters)) == len(letters) and all(1 <= len(x) <= 3 for x in letters)
    assert {family.name: family.color for family in found}.items() >= colors.items()
    assert [x.letters for x in families_of(["skip", "stencil"])] == ["S", "Sk"]
    assert all(contrast(rgb(x.ink), rgb(x.color)) >= 4.5 for x in found)
    assert len({*colors.values(), *SPARE}) == len(colors) + len(SPARE)


def test_frames_and_size_are_read_from_the_file(tmp_path):
    ((dense, _),) = example_videos(tmp_path, 1)
    data = base64.b64decode(dense)
    assert timing_of(data) == (8.0, 25, 96, 96)
    report = {**LEAST, "clips": [{"prompt": "a", "dense": dense}]}
    (video,) = Page(render_page(report)).all("video")
    assert (video["width"], video["height"]) == ("96", "96")
    for broken in (b"", b"no mp4 at all", data[:60], data.replace(b"stts", b"sttt")):
        assert timing_of(broken) is None
