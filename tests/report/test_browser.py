"""The page in a browser: what it does, where a Chromium is found."""

import base64
import io
import json

import pytest
from PIL import Image
from support.browser import Browser, find_chromium
from support.example import EVIL_PROMPT, example_report, example_videos

from visattn.report import write_page

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium: none on the path, and CHROMIUM names none"
)
VIDEOS = "[...document.querySelectorAll('.clip:not([hidden]) video')]"
STILL = f"{VIDEOS}.every(v => v.readyState > 1)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return example_report(videos=example_videos(tmp_path_factory.mktemp("videos"), 4))


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(report, path)
    return path


@pytest.fixture
def page(tab, path):
    """The example, open in a window of 1280 pixels."""
    tab.open(path)
    yield tab
    assert tab.trouble == []


def texts(page, query):
    return page.eval(f"[...document.querySelectorAll({query!r})].map(n => n.innerText.trim())")


def click(page, query):
    page.eval(f"document.querySelector({query!r}).click()")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_page_fits_its_window(tab, path, width, dark):
    tab.open(path, width=width, dark=dark)
    assert tab.eval("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("L")
    assert picture.width == width and len(picture.getcolors()) > 20
    assert (picture.getpixel((2, 2)) < 60) is dark
    assert tab.trouble == []


def test_nothing_is_fetched_and_nothing_is_injected(page):
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.eval("[document.images.length, document.scripts.length]") == [0, 2]
    assert EVIL_PROMPT in "".join(texts(page, ".choices label"))


def test_everything_that_can_be_used_has_a_name(page):
    page.call("Accessibility.enable")
    roles = {"button", "radio", "checkbox", "slider", "combobox", "grid", "gridcell", "region",
             "link", "img", "figure", "heading", "columnheader", "rowheader"}
    found = {}
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if role in roles and not node.get("ignored"):
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    page.call("Accessibility.disable")
    assert found.keys() >= {"button", "radio", "slider", "combobox", "grid", "gridcell", "link"}
    nameless = {role: names.count("") for role, names in found.items() if "" in names}
    nameless.pop("columnheader", None)  # of bars
    assert nameless.keys() <= {"gridcell", "figure"}


def test_videos_play_in_step_and_loop(tab, path):
    tab.open(path, still=False)
    times = f"{VIDEOS}.map(v => v.currentTime)"
    frame = "Number(document.querySelector('.transport input').value)"
    tab.eval("document.querySelector('.transport select').value = '0.25', 1")
    tab.until(f"{frame} > 3")
    one, two = tab.eval(times)
    assert abs(one - two) <= 1 / 8
    tab.eval(f"{VIDEOS}.forEach(v => v.currentTime = 3)")
    tab.until(f"{frame} < 3")  # it began anew
    tab.until(f"{frame} > 0")
    click(tab, "[data-do=play]")
    tab.until(f"new Set({times}).size === 1")
    assert tab.trouble == []


def test_frames_are_chosen_for_both_videos(page):
    page.until(STILL)
    state = f"{VIDEOS}.map(v => [Math.floor(v.currentTime * 8), v.paused, v.controls])"
    assert page.eval(state) == [[0, True, False]] * 2  # reduced motion: nothing plays by itself
    click(page, "[data-do=next]")
    click(page, "[data-do=next]")
    assert page.eval(state) == [[2, True, False]] * 2
    page.eval("document.querySelector('.transport input[type=range]').focus()")
    page.press("End")
    assert page.eval(state) == [[24, True, False]] * 2
    assert texts(page, ".transport output") == ["25 / 25"]
    click(page, "[data-do=next]")
    assert page.eval(state) == [[0, True, False]] * 2
    click(page, "[data-do=back]")
    assert page.eval(state) == [[24, True, False]] * 2


def test_clip_is_chosen_with_its_figures_and_difference(page, report):
    page.until(STILL)
    page.eval("document.querySelector('.choices input').focus()")
    page.press("ArrowDown")
    assert texts(page, ".clip:not([hidden]) dt") == ["PSNR", "SSIM", "flicker"]
    value = report["clips"][1]["metrics"][0]["value"]
    assert texts(page, ".clip:not([hidden]) dd")[0] == f"{value:.1f} dB"
    assert page.eval("document.querySelectorAll('.clip:not([hidden]) .transport').length") == 1
    page.until(STILL)
    click(page, ".transport input[type=checkbox]")
    page.until("document.querySelector('.clip:not([hidden]) .difference canvas').width === 96")
    pixels = """(c => Math.max(...c.getContext('2d').getImageData(0, 0, 96, 96).data
        .filter((_, n) => n % 4 < 3)))(document.querySelector('.clip:not([hidden]) canvas'))"""
    assert 5 < page.eval(pixels) < 120  # the noise, and nothing of the square


def test_heads_are_reached_by_keys(page, report):
    stops = "document.querySelectorAll('.map td[tabindex=\"0\"]').length"
    here = "document.activeElement.getAttribute('aria-label')"
    assert page.eval(stops) == 2  # one for each panel
    page.eval("document.querySelector('.map td[tabindex=\"0\"]').focus()")
    assert page.eval(here).startswith("layer 0, head 0: ")
    page.press("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight")
    assert page.eval(here).startswith("layer 2, head 1: ")
    assert texts(page, "#tip")[0].startswith("layer 2, head 1: ")
    assert page.eval(stops) == 2
    page.press("Enter")
    assert texts(page, "#detail h3")[0].startswith("Layer 2, head 1, phase 0")
    assert page.eval("document.activeElement.getAttribute('aria-selected')") == "true"
    page.press("Home")
    assert page.eval(here).startswith("layer 2, head 0: ")
    page.press("Escape")
    assert page.eval("document.querySelector('#tip').hidden")


def test_selected_head_shows_its_stencil_beside_its_attention(page, report):
    index = next(n for n, s in enumerate(report["stencils"]) if s["columns"])
    stencil = report["stencils"][index]
    click(page, f".map td[data-i='{index}']")
    names = texts(page, "#detail figcaption")
    assert names[:13] == [f"dt {n:+d}".replace("-", "−").replace("+0", "0") for n in range(-6, 7)]
    assert names[13:] == [f"frame {n}" for n in range(7)]
    words = texts(page, "#detail")[0]
    assert f"kept, {len(stencil['kept'])} of 325" in words and "query 3, 5, 6" in words
    assert "columns: 1 tile" in words
    peak = "[...document.querySelectorAll('#detail .own canvas')].map(c => [c.width, c.height])"
    (a, b), (c, d) = page.eval(peak)
    assert a == b > 20 and c == d > 20


def test_heads_are_coloured_by_what_is_asked_for(page, report):
    color = "[...document.querySelectorAll('.map td[data-i]')].map(c => getComputedStyle(c)['%s'])"
    families = [head["family"] for head in report["heads"]]
    found = page.eval(color % "backgroundColor")
    assert len(set(zip(families, found, strict=True))) == len(set(families)) == len(set(found))
    for way, known in (("density", None), ("error", None), ("stability", "stability")):
        click(page, f"input[value={way}]")
        now = page.eval(color % "backgroundColor")
        assert len(set(now)) > 10, way
        hatched = [image != "none" for image in page.eval(color % "backgroundImage")]
        assert hatched == [known is not None and head[known] is None for head in report["heads"]]
    click(page, "input[value=family]")
    assert page.eval(color % "backgroundColor") == found


@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("up", ["psnr", "error"])
def test_labels_of_the_front_do_not_overlap(tab, path, width, up):
    tab.open(path, width=width)
    click(tab, f"#front input[value={up}]")
    boxes = tab.eval("""[...document.querySelectorAll('#chart g[aria-hidden] text')].map(t => {
        const { left, top, right, bottom } = t.getBoundingClientRect();
        return [left, top + 2, right, bottom - 2, t.textContent, t.className.baseVal]; })""")
    assert len(boxes) >= (8 if width == 360 else 14)
    assert [box[4] for box in boxes if box[5]] == ["searched, 1.35x"]
    for n, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= width
        for b in boxes[:n]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (a, b)


def test_front_has_its_marks_lines_and_keys(page):
    marks = "[...document.querySelectorAll('#chart g[role=img]')].map(g => g.ariaLabel)"
    assert len(page.eval(marks)) == 15  # dense is a line
    assert page.eval("document.querySelectorAll('#chart .reference, #chart .ring').length") == 3
    assert page.eval("document.querySelectorAll('#chart .whisker').length") == 15
    page.eval("document.querySelector('#chart g[tabindex=\"0\"]').focus()")
    page.press("ArrowRight")
    assert texts(page, "#tip")[0].startswith("sliding_tile, 0.4, uniform static")
    click(page, "#front input[value=measured]")
    assert len(page.eval(marks)) == 14  # the oracle's speed is not measured
    assert "1 without these values" in texts(page, "#chart")[0]


def test_table_is_sorted_by_its_heads(page, report):
    values = "[...document.querySelectorAll('.plans tbody tr')].map(r => r.cells[%d].dataset.v)"
    click(page, ".plans thead th:nth-child(7) button")  # PSNR
    psnr = sorted((row["psnr"] for row in report["table"] if row["psnr"]), reverse=True)
    assert page.eval(values % 6) == [*map(str, psnr), ""]
    sort = "document.querySelector('.plans thead th:nth-child(7)').ariaSort"
    assert page.eval(sort) == "descending"
    click(page, ".plans thead th:nth-child(7) button")
    assert page.eval(values % 6) == [*map(str, reversed(psnr)), ""]
    click(page, ".plans thead th:first-child button")
    assert page.eval(values % 0) == sorted((row["name"] for row in report["table"]), key=str.lower)
    assert page.eval(sort) is None


def test_theme_is_changed_by_its_button(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.eval(paper)
    seen = []
    for _ in range(3):
        click(page, "#theme")
        seen.append((texts(page, "#theme")[0], page.eval(paper) == light))
    assert seen == [("theme: light", True), ("theme: dark", False), ("theme: auto", True)]


def test_plan_is_offered_as_a_file_and_as_text(page, report):
    page.eval("document.querySelector('#plan-text').open = true")
    assert json.loads(page.eval("document.querySelector('#plan-text code').textContent")) == (
        report["plan"]
    )
    assert page.eval("document.querySelector('#plan-file').href").startswith("blob:")
    assert len(texts(page, ".copied")) == 2


def test_paper_is_white(tab, path):
    tab.open(path, dark=True)
    assert len(tab.call("Page.printToPDF")["data"]) > 50_000
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.eval("getComputedStyle(document.documentElement).colorScheme") == "light"
    tab.call("Emulation.setEmulatedMedia", media="")


def test_essentials_need_no_script(tab, path, report):
    tab.open(path, script=False)
    tab.call("Emulation.setScriptExecutionDisabled", value=False)  # for the questions below
    assert texts(tab, ".headline dd")[0].startswith("1.35x")
    assert len(texts(tab, ".plans tbody tr")) == len(report["table"])
    assert texts(tab, ".claims .state")[2] == "✕ does not hold"
    colors = tab.eval("[...document.querySelectorAll('.map td[data-i]')].map("
                      "c => getComputedStyle(c).backgroundColor)")
    assert len(set(colors)) == len({head["family"] for head in report["heads"]})
    assert tab.eval("document.querySelectorAll('video[controls]').length") == 8
    assert "drawn by a script" in texts(tab, "#chart")[0]


def test_video_that_cannot_be_played_says_so(tab, report, tmp_path):
    clip = {"prompt": "damaged", "dense": base64.b64encode(b"no mp4").decode(), "sparse": None}
    write_page({**report, "clips": [clip]}, tmp_path / "page.html")
    tab.open(tmp_path / "page.html")
    tab.until("document.querySelectorAll('.absent').length === 2")
    assert texts(tab, ".absent") == ["this browser cannot play it", "no video kept"]


@pytest.mark.parametrize("left_out", ["stencils", "clips", "front", "heads", "plan", "table"])
def test_parts_that_are_missing_break_nothing(tab, report, tmp_path, left_out):
    write_page({**report, left_out: []}, tmp_path / "page.html")
    tab.open(tmp_path / "page.html")
    assert tab.trouble == []


def test_gaps_in_the_data_break_nothing(tab, report, tmp_path):
    heads = [{**head, "density": None, "error": None, "stability": None, "pattern": None}
             for head in report["heads"][::3]]
    stencils = [{**s, "attention": None, "query": None, "kept": None} for s in report["stencils"]]
    front = [{"name": "one", "kind": "searched", "speed": 1.2, "error": 0.1}]
    clips = [{"prompt": "one side", "sparse": report["clips"][0]["sparse"]}, {"prompt": "none"}]
    changed = {"heads": heads, "stencils": stencils, "front": front, "clips": clips}
    write_page({**report, **changed}, tmp_path / "page.html")
    tab.open(tmp_path / "page.html")
    for way in ("density", "error", "stability"):
        click(tab, f"input[value={way}]")
    click(tab, ".choices label:nth-of-type(2) input")
    assert texts(tab, ".clip:not([hidden]) .absent") == ["no video kept"] * 2
    assert len(tab.eval("[...document.querySelectorAll('#chart g[role=img]')].map(() => 1)")) == 1
    assert tab.trouble == []


def test_a_script_of_another_text_does_not_run(tab, path):
    tab.open(path)
    tab.eval(
        "{const s = document.createElement('script'); s.textContent = 'window.other = 1';"
        " document.body.append(s)}"
    )
    assert tab.eval("window.other === undefined && document.documentElement.dataset.ready === '1'")
    tab.trouble.clear()  # the browser has said that it refused it
