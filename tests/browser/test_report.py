"""A report in a browser: nothing is asked for, nothing fails, and everything fits, in light, in dark and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meft_engine.cli import main
from meft_engine.run_report.drawing import DARK, LIGHT
from tests.run_logs import write_run

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it (Debian: apt-get install chromium) or name it in CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    with api.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module", params=["one run", "three runs", "runs that are given"])
def report(request, tmp_path_factory) -> Path:
    """The page of runs whose names and settings are long, or of those in RUNS."""
    folder = tmp_path_factory.mktemp("report")
    if request.param == "runs that are given":
        given = os.environ.get("RUNS", "").split()
        if not given:
            pytest.skip("RUNS names no folders of runs")
        assert main(["report", *given, "--output", str(folder / "report.html")]) == 0
        return folder / "report.html"
    count = 1 if request.param == "one run" else 3
    names = [f"{'a-very-long-name-without-a-break' * 2}-{n}<script>alert({n})</script>" for n in range(count)]
    runs = [
        write_run(folder / name, steps=40, zero_stage=n, device=f"{'long' * 30}{n}") for n, name in enumerate(names)
    ]
    assert main(["report", *map(str, runs), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_it_is_shown_whole(report, browser, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it moves sideways"
    beyond = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, p, dt, dd, li, svg, summary, .scroll')]"
        ".filter(e => !e.closest('.scroll') || e.matches('.scroll'))"
        f".filter(e => !e.closest('svg.chart svg') && e.getBoundingClientRect().right > {width})"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    colors = {"light": LIGHT, "dark": DARK}[scheme]
    shown = page.evaluate(
        "[getComputedStyle(document.querySelector('#loss svg text')).fill,"
        " getComputedStyle(document.querySelector('figure')).backgroundColor,"
        " getComputedStyle(document.querySelector('#loss [id$=line2d_1] path, #loss g[id*=line2d] path')).stroke]"
    )
    assert shown[0] == rgb(colors["muted"]) and shown[1] == rgb(colors["surface"])
    assert shown[2] in {rgb(colors["grid"]), rgb(colors["frame"]), rgb(colors["muted"])}
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_what_is_behind_them(scheme):
    """WCAG 2 asks 4.5 : 1 of letters and 3 : 1 of lines that mean something; levels of the map shall be told apart."""
    colors = {"light": LIGHT, "dark": DARK}[scheme]
    for name in ("ink", "muted"):
        assert contrast(colors[name], colors["surface"]) >= 4.5, name
    for name in (f"run{n}" for n in range(8)):
        assert contrast(colors[name], colors["surface"]) >= 3, name
    for level in range(8):
        assert contrast(colors[f"load{level}"], colors[f"load{level + 1}"]) >= 1.2, level


def rgb(color: str) -> str:
    """As a browser writes it."""
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
