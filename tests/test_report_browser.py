"""The report in a real Chromium: what its scripts draw, what they say on hover and by keyboard, dark, narrow, printed.

Skipped where there is none. Debian: `apt-get install chromium`; or FASTCALIB_CHROMIUM is a path of Chromium or Chrome.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the report needs the extra fastcalib[report]")
pytest.importorskip("pyarrow", reason="the report needs the extra fastcalib[report]")

from fastcalib.report.data import read_runs
from fastcalib.report.page import collect, render

from .browser import Browser, find_chromium
from .report_runs import NASTY, write_toy_run

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (Debian: apt-get install chromium)")
NAME = '<img src=x onerror="window.hacked=1"> & co'
CHARTS = {"fig-temperature": 2, "fig-frontier": 4, "fig-shape": 6, "fig-compounding": 4}


def write_page(page: Path, *folders: Path) -> Path:
    """The page alone, without the pictures."""
    runs = read_runs(folders)
    page.write_text(render(runs, *collect(runs)), "utf-8")
    return page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    one = write_toy_run(folder / "one", model=NAME)
    two = write_toy_run(folder / "two", model="toy-large", skill=5.0, seed=1)
    return {
        "one": write_page(folder / "one.html", one),
        "both": write_page(folder / "both.html", one, two),
        # One model and one task, so that the names are those of the folders.
        "three": write_page(folder / "three.html", *(write_toy_run(folder / name) for name in "abc")),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM)
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def nothing_went_wrong(browser: Browser) -> Iterator[None]:
    """After every test: no error or warning in the page, and nothing asked of the network but the file itself."""
    browser.errors.clear()
    browser.requests.clear()
    yield
    assert browser.errors == []
    assert {url.split("/")[-1] for url in browser.requests} <= {"one.html", "both.html", "three.html", "data:,"}


def payload(browser: Browser) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(browser.evaluate("document.getElementById('data').textContent"))
    return found


def centres(browser: Browser, selector: str) -> list[tuple[float, float]]:
    """Where elements stand in the window, once the first is scrolled to."""
    query = json.dumps(selector)
    browser.evaluate(f"document.querySelector({query}).scrollIntoView({{block: 'center'}})")
    browser.frames()
    found = browser.evaluate(
        f"[...document.querySelectorAll({query})].map((e) => {{ const b = e.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })"
    )
    return [(x, y) for x, y in found]


TIP = "(() => { const t = document.querySelector('.tip'); return !t || t.hidden ? null : t.innerText; })()"


def percent(share: float) -> str:
    """As the page writes shares of more than 10%."""
    return f"{float(f'{100 * share:.3g}'):g}%"


@pytest.mark.parametrize("name", ["one", "both"])
def test_every_chart_is_drawn(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert browser.evaluate("document.documentElement.dataset.ready") == "true"
    runs = 1 if name == "one" else 2
    families = 5 if runs == 1 else 2  # all families of one run, or one family of each run
    of_runs = {"fig-val-div": families, "fig-rules": runs, "fig-reliability": runs, "fig-prefix": 1 + 2 * runs}
    for figure, charts in (CHARTS | of_runs).items():
        assert browser.evaluate(f"document.querySelectorAll('#{figure} svg').length") == charts, figure
    # What is drawn has a place: no NaN has reached an attribute.
    assert (
        browser.evaluate(
            "[...document.querySelectorAll('svg *')].filter((e) => /NaN|undefined|Infinity/.test(e.outerHTML)).length"
        )
        == 0
    )
    # One stroke a valid token, in the first lane of the strip; one dot a rule.
    found = payload(browser)
    ticks = browser.evaluate("document.querySelectorAll('#fig-prefix .rug').length")
    valid = sum(len(d[0]["valid"]["greater"]) for d in found["details"])
    assert ticks == valid + sum(d[0]["top"]["valid"].count(0) for d in found["details"])
    dots = browser.evaluate("document.querySelectorAll('#fig-rules .dot').length")
    assert dots == sum(len(table["rows"]) for table in found["rules"])
    assert browser.evaluate("window.hacked") is None
    assert NAME in browser.evaluate("document.querySelector('h1').textContent")


def test_hovering_gives_the_values_of_the_point(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    bins = payload(browser)["reliability"][0]
    for b, (x, y) in zip(bins, centres(browser, "#fig-reliability .dot"), strict=True):
        browser.move(x + 3, y - 2)  # near is enough
        tip = browser.evaluate(TIP)
        assert f"accuracy\n{percent(b['accuracy'])}" in re.sub(r"\s*\n\s*|\t", "\n", tip)
        assert f"tokens\n{b['count']}" in re.sub(r"\s*\n\s*|\t", "\n", tip)
    browser.move(2, 2)
    assert browser.evaluate(TIP) is None


def test_a_point_stands_where_its_numbers_say(browser: Browser, pages: dict[str, Path]) -> None:
    # From the drawing back to the data: positions between the axis ticks at 0% and 100%.
    browser.open(pages["one"])
    places = centres(browser, "#fig-rules .dot")
    ticks = browser.evaluate(
        "[...document.querySelectorAll('#fig-rules .grid text')].map((t) => { const b = t.getBoundingClientRect();"
        "return [t.textContent, b.x + b.width / 2, b.y + b.height / 2, t.getAttribute('text-anchor')]; })"
    )
    y_of = {text: y for text, _, y, anchor in ticks if anchor == "end"}
    grid = browser.evaluate(
        "(() => { const a = [...document.querySelectorAll('#fig-rules .grid line.axis')].pop().getBoundingClientRect();"
        "return [a.left, a.right]; })()"
    )
    table = payload(browser)["rules"][0]
    at = table["temperatures"].index(1)
    rows = [(row["recall"][at], row["precision"][at]) for row in table["rows"]]
    for (recall, precision), (x, y) in zip(rows, places, strict=True):
        assert (x - grid[0]) / (grid[1] - grid[0]) == pytest.approx(recall, abs=0.005)  # a few pixels of 900
        assert (y_of["0%"] - y) / (y_of["0%"] - y_of["100%"]) == pytest.approx(precision, abs=0.02)


def test_the_keyboard_reaches_every_chart_and_reads_it(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    charts = browser.evaluate("document.querySelectorAll('svg').length")
    # Chromium lets any SVG that listens have the focus; other browsers want to be told.
    assert browser.evaluate("document.querySelectorAll('svg[tabindex=\"0\"]').length") == charts
    kind = "(() => { const e = document.activeElement; return [e.tagName, e.className, e.id || '']; })()"
    reached, tables = 0, 0
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.textContent") == "Skip to the results"
    for _ in range(200):
        browser.press("Tab")
        tag, css, _ = browser.evaluate(kind)
        if tag == "BODY":
            break
        reached += tag == "svg"
        tables += css == "scroll"
    assert reached == charts
    assert tables >= 4  # tables that stand open; they scroll on a phone

    browser.evaluate("document.querySelector('#fig-temperature svg').focus()")
    entry = next(e for e in payload(browser)["sequence"][0] if e["rule"] == "none")
    spoken = "document.querySelector('[aria-live]').textContent"
    browser.press("ArrowRight")
    assert f"T = {entry['temperature'][0]}, validity: {percent(entry['validity'][0])}" in browser.evaluate(spoken)
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert f"T = {entry['temperature'][2]}," in browser.evaluate(spoken)
    browser.press("ArrowLeft")
    assert f"T = {entry['temperature'][1]}, validity: {percent(entry['validity'][1])}" in browser.evaluate(spoken)
    assert browser.evaluate(TIP) is not None
    browser.press("Escape")
    assert browser.evaluate(TIP) is None


def test_up_and_down_go_from_series_to_series(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    browser.evaluate("document.querySelector('#fig-temperature svg').focus()")
    spoken = "document.querySelector('[aria-live]').textContent"
    for key in ("ArrowRight", "ArrowRight"):
        browser.press(key)
    first = browser.evaluate(spoken)
    browser.press("ArrowDown")
    second = browser.evaluate(spoken)
    assert first.startswith(f"{NAME}, no cutoff, T = 0.6") and second.startswith("toy-large, no cutoff, T = 0.6")
    browser.press("ArrowUp")
    assert browser.evaluate(spoken) == first


LUMINANCE = """
(() => {
  const style = getComputedStyle(document.documentElement), probe = document.createElement("span");
  document.body.append(probe);
  const light = (name) => {
    probe.style.color = `var(${name})`;
    const c = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
  };
  const names = ["--paper", "--ink", "--soft", "--muted", ...[0, 1, 2, 3, 4, 5, 6, 7].map((i) => `--run-${i}`)];
  const found = Object.fromEntries(names.map((name) => [name, light(name)]));
  probe.remove();
  return found;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_follow_the_system_and_the_button(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    browser.open(pages["one"], dark=dark)
    strokes = []
    for turned in (False, True):
        light = browser.evaluate(LUMINANCE)
        assert (light["--paper"] < 0.1) == (dark != turned)
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgba(0, 0, 0, 0)"
        # WCAG AA for text, on paper; lines and labels of runs as well.
        for name, value in light.items():
            if name != "--paper":
                bright, dim = max(value, light["--paper"]), min(value, light["--paper"])
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, dark, turned)
        line = browser.evaluate("getComputedStyle(document.querySelector('#fig-temperature .line')).stroke")
        strokes.append(line)
        browser.evaluate("document.querySelector('.theme').click()")
    assert strokes[0] != strokes[1]


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], width=360, height=740, phone=True)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.frames()
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    beyond = browser.evaluate(
        "[...document.querySelectorAll('svg, h1, h2, h3, p, select, button, summary, svg text')]"
        ".filter((e) => { const b = e.getBoundingClientRect(); return b.width && (b.right > 360.5 || b.left < -0.5); })"
        ".map((e) => e.outerHTML.slice(0, 120))"
    )
    assert beyond == []
    small = browser.evaluate(
        "[...document.querySelectorAll('svg text, p, td, th, li')]"
        ".filter((e) => parseFloat(getComputedStyle(e).fontSize) < 11).length"
    )
    assert small == 0
    # A touch gives values too, inside the window.
    x, y = centres(browser, "#fig-reliability .dot")[-1]
    browser.move(x, y)
    box = browser.evaluate(
        "(() => { const b = document.querySelector('.tip').getBoundingClientRect(); return [b.left, b.right]; })()"
    )
    assert box[0] >= 0 and box[1] <= 360


def test_charts_follow_the_width_of_the_window(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], width=1280)
    width = "Number(document.querySelector('#fig-rules svg').getAttribute('viewBox').split(' ')[2])"
    wide = browser.evaluate(width)
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    browser.frames()
    assert browser.evaluate(width) < 400 < wide
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400


def test_controls_change_what_is_drawn(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    found = payload(browser)
    choose = (
        "(([figure, name, value]) => { const s = document.querySelector(`#${figure} select[data-control=${name}]`);"
    )
    choose += "s.value = String(value); s.dispatchEvent(new Event('change')); })"

    # Another prefix: its tokens, in order, as text.
    tokens = "[...document.querySelectorAll('#fig-prefix .tokens ol')]"
    tokens += ".map((list) => [...list.children].map((item) => [item.className, item.firstChild.data]))"
    which = next(i for i, p in enumerate(found["prefixes"]) if NASTY[0] in p["text"])
    browser.evaluate(f"{choose}({json.dumps(['fig-prefix', 'prefix', which])})")
    for shown, details in zip(browser.evaluate(tokens), found["details"]):
        top = details[which]["top"]
        assert [css == "valid" for css, _ in shown] == [bool(v) for v in top["valid"][: len(shown)]]
        plain = {text: text for text in top["text"] if re.fullmatch(r"[\x21-\x7e]+", text)}
        assert all(plain.get(text, shown_text) == shown_text for text, (_, shown_text) in zip(top["text"], shown))
    assert browser.evaluate("window.alerted || window.hacked || null") is None

    # Another temperature for the rules.
    place = "document.querySelector('#fig-rules .dot').getAttribute('d')"
    before = browser.evaluate(place)
    browser.evaluate(f"{choose}({json.dumps(['fig-rules', 't', 0])})")
    after = browser.evaluate("[...document.querySelectorAll('#fig-rules .dot')].map((d) => d.getAttribute('d'))")
    assert (
        len(after) == sum(len(table["rows"]) for table in found["rules"]) and before in after
    )  # no cutoff does not move
    assert "temperature 0.3" in browser.evaluate("document.querySelector('#fig-rules svg').getAttribute('aria-label')")


def test_one_family_of_rules_can_be_looked_at(browser: Browser, pages: dict[str, Path]) -> None:
    choose = "(([figure, label]) => { const s = document.querySelector(`#${figure} select[data-control=family]`);"
    choose += "s.value = [...s.options].findIndex((o) => o.textContent === label);"
    choose += "s.dispatchEvent(new Event('change')); })"
    names = "[...document.querySelectorAll('#{} text.direct')].map((t) => t.textContent)"

    browser.open(pages["one"])
    found = payload(browser)
    own = [entry for entry in found["sequence"][0] if entry["family"] == "top-k"]
    browser.evaluate(f"{choose}({json.dumps(['fig-val-div', 'top-k'])})")
    assert browser.evaluate("document.querySelectorAll('#fig-val-div svg').length") == 1
    # Every rule has its number beside its line, the references their names; lines start with a hollow dot.
    assert sorted(browser.evaluate(names.format("fig-val-div"))) == sorted(
        [*(str(entry["parameter"]) for entry in own), "no cutoff", "size oracle"]
    )
    lines = browser.evaluate("document.querySelectorAll('#fig-val-div .line').length")
    assert lines == len(own) + 2 == browser.evaluate("document.querySelectorAll('#fig-val-div .hollow').length")

    browser.evaluate(f"{choose}({json.dumps(['fig-rules', 'top-k'])})")
    shown = browser.evaluate(names.format("fig-rules"))
    assert {entry["label"] for entry in own} <= set(shown) <= {"no cutoff", "size oracle"} | {e["label"] for e in own}
    # The line that joins them goes through the places of their dots, in the order of their numbers.
    path = browser.evaluate("[...document.querySelectorAll('#fig-rules .line')].pop().getAttribute('d')")
    assert path.count("L") == len(own) - 1


def test_logarithmic_axes(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    press = "[...document.querySelectorAll('#{} .segment label')].find((l) => l.textContent === 'logarithmic').click()"
    places = "[...document.querySelectorAll('#{0} svg')].map((s) => [...s.querySelectorAll('{1}')].map((e) => {{"
    places += "const b = e.getBoundingClientRect(); return [e.textContent, b.x + b.width / 2, b.y + b.height / 2]; }}))"
    browser.evaluate(press.format("fig-rules"))
    browser.frames()
    (ticks,) = browser.evaluate(places.format("fig-rules", ".grid text[text-anchor=end]"))
    y_of = {text: y for text, _, y in ticks}
    (dots,) = browser.evaluate(places.format("fig-rules", ".dot"))
    table = payload(browser)["rules"][0]
    at = table["temperatures"].index(1)
    decade = y_of["1%"] - y_of["10%"]
    for row, (_, _, y) in zip(table["rows"], dots, strict=True):
        want = y_of["10%"] - math.log10(10 * row["precision"][at]) * decade
        assert y == pytest.approx(want, abs=2), row["label"]  # two pixels of 300
    # An axis has five powers of ten, from a round number down, and what is too small for it has no place on it.
    axis = browser.evaluate("Page.shareLog([0, null, 1e-9, 0.3])")
    assert (axis["min"], axis["max"]) == (pytest.approx(5e-6), 0.5)
    inside = "Parts.scaleOf({{log: true, min: 1e-3, max: 1}}, 0, 100).inside({})"
    assert [browser.evaluate(inside.format(v)) for v in (1, 1e-3, 9e-4, 0, "null")] == [True, True, False, False, False]
    browser.evaluate(press.format("fig-val-div"))
    browser.frames()
    outside = "[...document.querySelectorAll('#fig-val-div svg')].flatMap((s) => {"
    outside += "const floor = [...s.querySelectorAll('.grid line.axis')].pop().getBoundingClientRect().bottom;"
    outside += "return [...s.querySelectorAll('.dot')].map((d) => d.getBoundingClientRect().top - floor); })"
    assert max(browser.evaluate(outside)) <= 0


def test_names_at_the_ends_of_lines_do_not_meet(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["three"])
    found = browser.evaluate(
        "[...document.querySelectorAll('#fig-temperature svg, #fig-shape svg')].map((s) => [...s.querySelectorAll('"
        "text.direct')].map((t) => { const b = t.getBoundingClientRect(); return [t.textContent, b.top, b.bottom]; }))"
    )
    assert len(found) == 8
    for chart in found:
        assert sorted(name for name, _, _ in chart) == ["a", "b", "c"]  # every run is named
        boxes = sorted((top, bottom) for _, top, bottom in chart)
        assert all(a[1] <= b[0] + 2 for a, b in itertools.pairwise(boxes))  # line boxes have a pixel or two of air


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (3.8e-5, "0.0038%"), (1e-10, "1e-8%"), (0.0123, "1.2%"), (0.12345, "12.3%"), (0.9999, "> 99.9%")],
)
def test_small_shares_are_written_out(browser: Browser, pages: dict[str, Path], share: float, text: str) -> None:
    if not browser.evaluate("typeof Chart === 'object'"):
        browser.open(pages["one"])
    assert browser.evaluate(f"Chart.percent({share})") == text


def test_runs_can_be_switched_off_but_not_all(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"])
    lines = "document.querySelectorAll('#fig-temperature .line').length"
    pressed = "[...document.querySelectorAll('.runs button')].map((b) => b.getAttribute('aria-pressed'))"
    press = "document.querySelectorAll('.runs button')[{}].click()"
    assert browser.evaluate(lines) == 4
    browser.evaluate(press.format(0))
    assert (browser.evaluate(lines), browser.evaluate(pressed)) == (2, ["false", "true"])
    stroke = "document.querySelector('#fig-temperature .mark').style.getPropertyValue('--mark')"
    assert browser.evaluate(stroke) == "var(--run-1)"  # the colour stays with the run
    browser.evaluate(press.format(1))
    assert (browser.evaluate(lines), browser.evaluate(pressed)) == (2, ["false", "true"])
    browser.evaluate(press.format(0))
    assert (browser.evaluate(lines), browser.evaluate(pressed)) == (4, ["true", "true"])


def test_printing_leaves_the_controls_away(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], dark=True)
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    for selector in (".controls", "nav", ".theme"):
        assert browser.evaluate(f"getComputedStyle(document.querySelector('{selector}')).display") == "none"
    assert browser.evaluate(LUMINANCE)["--ink"] < 0.1  # dark on white, whatever the screen has
    assert browser.evaluate("document.querySelectorAll('svg').length") > 20


def test_a_screenshot_shows_the_whole_page(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    browser.open(pages["one"])
    browser.screenshot(tmp_path / "page.png")
    image = (tmp_path / "page.png").read_bytes()
    width, height = (int.from_bytes(image[i : i + 4], "big") for i in (16, 20))
    assert [width, height] == pytest.approx(
        browser.evaluate("[innerWidth, document.documentElement.scrollHeight]"), abs=1
    )
    assert len(image) > 100_000  # charts, not blank paper
