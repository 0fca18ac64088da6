"""The report of runs: its numbers are those of their logs, what it quotes is harmless, and it follows a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from meft_engine import run_log
from meft_engine.cli import main
from meft_engine.run_report import charts, words
from meft_engine.run_report import page as page_module
from meft_engine.run_report.drawing import DARK, LIGHT
from meft_engine.run_report.layer_charts import relative_loads
from meft_engine.run_report.reader import differing, names_of, read_run
from tests.run_logs import set_back, start_of, write_reading, write_run

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would find: elements, the numbers, and the tables by the titles of their figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.elements, self.ids = text, [], []
        self.scripts: list[str] = []
        self.tables: dict[str, list[list[Any]]] = {}
        self._figure, self._cell, self._inside = "", None, []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self._inside.append(tag)
        if tag == "figure":
            self._figure = found["id"]
        elif tag == "table":
            self.tables[self._figure or found.get("class", "")] = []
        elif tag == "tr":
            self.tables[list(self.tables)[-1]].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "data":
            self._cell = float(found["value"])
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = (
            self._inside[: len(self._inside) - 1 - self._inside[::-1].index(tag)] if tag in self._inside else []
        )
        if tag in ("td", "th"):
            self.tables[list(self.tables)[-1]][-1].append(self._cell)
            self._cell = None
        elif tag == "figure":
            self._figure = ""

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] += data
        elif isinstance(self._cell, str):
            self._cell += data

    @property
    def numbers(self) -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.scripts[0], parse_constant=refuse)


def report(*folders: Path, output: Path) -> Page:
    assert main(["report", *map(str, folders), "--output", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in run_log.read(folder) if record["kind"] == kind]


# --- numbers


def test_numbers_are_those_of_the_log(tmp_path):
    run = write_run(tmp_path / "run")
    found = report(run, output=tmp_path / "report.html")
    (data,) = found.numbers
    steps, (start,), (layers,) = records(run, "step"), records(run, "start"), records(run, "layers")
    assert data["steps"] == steps and data["start"] == start and data["layers"] == [layers]
    assert data["memory"] == records(run, "memory") and data["evaluations"] == records(run, "evaluation")
    assert data["train_report"] == json.loads((run / "train_report.json").read_text())

    def column(name: str) -> list[list[float]]:
        return [[record["step"], record["figures"][name]] for record in steps]

    assert found.tables["loss"][1:] == column("loss")
    assert found.tables["touched"][1:] == column("touched_share")
    assert found.tables["dead"][1:] == column("dead_experts")
    assert found.tables["kept"][1:] == column("kept_mass")
    to_device, to_host = column("bytes_to_device"), column("bytes_to_host")
    assert found.tables["bytes"][1:] == [[*a, b] for a, (_, b) in zip(to_device, to_host, strict=True)]
    phases = ["forward", "routing", "backward", "data and script"]
    names = ["seconds/forward", "seconds/route", "seconds/backward", "seconds/other"]
    assert found.tables["phases"][0] == ["step", *phases]
    assert found.tables["phases"][1:] == [[r["step"], *(r["figures"][name] for name in names)] for r in steps]
    assert found.tables["exact-match"][1:] == [[0, 0, 0], [60, 0.875, 0.875]]
    assert found.tables["memory-host"][1:] == [
        *[["rows", 2**20, 2**20], ["moments", 2**21, 2**21], ["step counters", 2**12, 2**12]],
        ["all", 2**20 + 2**21 + 2**12, 2**20 + 2**21 + 2**12],
    ]
    assert found.tables["memory-device"][1:-1] == [
        *[["routers, trained", 2**14, 2**14], ["keys", 2**19, 2**19], ["slots of visiting rows", 2**17, 2**18]],
        ["gradients on their way", 0, 2**16],
    ]
    assert found.tables["experts-0"][1:] == [[n, *of] for n, of in zip(start["layers"], layers["load"], strict=True)]
    assert found.tables["updates"][1:] == [["0", 136], ["1", 20], ["2–3", 40], ["4–7", 60]]
    assert [row[1] for row in found.tables["touched-by-layer"][1:]] == layers["touched"]
    assert [row[1] for row in found.tables["kept-by-layer"][1:]] == layers["kept"]
    assert [row[1] for row in found.tables["dead-by-layer"][1:]] == [count / 8 for count in layers["dead"]]


def test_what_is_shown_of_a_number_is_near_it(tmp_path):
    text = report(write_run(tmp_path / "run"), output=tmp_path / "report.html").text
    pairs = re.findall(r'<data value="([^"]+)">([^<]+)</data>', text)
    units = {"%": 0.01, "ms": 1e-3, "s": 1, "min": 60, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "M": 1e6}
    assert len(pairs) > 100
    for exactly, shown in pairs:
        figures, _, unit = shown.partition(" ")
        assert float(figures.replace(",", "")) * units.get(unit, 1) == pytest.approx(float(exactly), rel=6e-3, abs=5e-4)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0012064, "0.001206"), (12.3456, "12.35"), (1234567.0, "1,234,567"), (3.2e-9, "3.2e-09"), (float("nan"), "nan")],
)
def test_four_figures(value, shown):
    assert words.plain(value) == shown


def test_loads_are_multiples_of_an_even_one():
    record = {"experts": 5, "experts_a_bin": 2, "load": [[8, 4, 8], [0, 0, 20], [0, 0, 0]]}
    assert relative_loads(record) == [[1.0, 0.5, 2.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]


def test_a_loss_that_is_not_finite_shows(tmp_path):
    run = write_run(tmp_path / "run", end=False)
    for step, loss in ((70, float("nan")), (80, float("inf")), (90, 1.5)):
        write_reading(run, step, 1.0, loss=loss)
    found = report(run, output=tmp_path / "report.html")
    assert [record["figures"]["loss"] for record in found.numbers[0]["steps"][-3:]] == ["nan", "inf", 1.5]
    assert "2 readings with a loss that is not finite" in found.text


def test_more_readings_than_a_page_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_POINTS", 4)
    found = report(write_run(tmp_path / "run", steps=12), output=tmp_path / "report.html")
    assert [row[0] for row in found.tables["loss"][1:]] == [10, 40, 70, 100, 120]
    assert "one of 3 readings" in found.text


def test_a_run_that_has_hardly_begun(tmp_path):
    run = tmp_path / "run"
    run_log.append(run, "evaluation", model="m", adapter=None, results={}, step=0)
    assert "No step has been taken yet" in report(run, output=tmp_path / "a.html").text
    run_log.append(run, "start", **start_of())
    assert "in training" in report(run, output=tmp_path / "b.html").text
    run_log.append(run, "end", step=0, error=None)
    assert "finished" in report(run, output=tmp_path / "c.html").text


# --- several runs


def test_only_settings_that_differ_are_set_side_by_side(tmp_path):
    one = write_run(tmp_path / "a" / "adapter")
    other = write_run(
        tmp_path / "b" / "adapter",
        meft={"router": {"balance": "bias"}, "monitor": {"folder": "elsewhere"}},
        optimizer={"name": "AdamW", "lr": 2e-3, "betas": [0.9, 0.99], "gradient_clipping": 1.0, "lr_scheduler": None},
    )
    found = report(one, other, output=tmp_path / "report.html")
    (_, header, first, second) = found.tables["runs"]
    assert header[:4] == ["run", "state", "router.balance", "optimizer.lr"] and header[4] == "step"
    assert (first[0].strip(), first[2], first[3]) == ("a", "loss", 0.001)
    assert (second[0].strip(), second[2], second[3]) == ("b", "bias", 0.002)
    assert found.tables["loss"][0] == ["step", "a", "b"] and len(found.tables["loss"][1]) == 3
    assert {"experts-0", "experts-1"} <= found.tables.keys()
    marked = re.findall(r'<tr class="differs"><th scope="row"><code>([^<]+)', found.text)
    assert marked == ["router.balance", "optimizer.lr"]
    alike = report(one, write_run(tmp_path / "c" / "adapter"), output=tmp_path / "alike.html")
    assert "The settings of all runs are the same." in alike.text and "settings that differ" not in alike.text


def test_many_runs(tmp_path):
    runs = [write_run(tmp_path / f"run{n}", zero_stage=n % 4) for n in range(9)]
    found = report(*runs, output=tmp_path / "report.html")
    assert [row[0].strip() for row in found.tables["runs"][2:]] == [f"run{n}" for n in range(9)]
    assert len(found.tables["loss"][0]) == 10


def test_runs_of_which_one_has_not_begun(tmp_path):
    run_log.append(tmp_path / "b", "evaluation", model="m", adapter=None, results={}, step=0)
    found = report(write_run(tmp_path / "a"), tmp_path / "b", output=tmp_path / "report.html")
    assert len(found.tables["runs"]) == 4 and differing([read_run(tmp_path / "b", "b")]) == []


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/demo/adapter"], ["runs/demo/adapter"]),
        (["/x/runs/demo/adapter"], ["demo/adapter"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/adapter", "runs/b/adapter"], ["a", "b"]),
        (["/x/runs/a", "/x/other/c"], ["runs/a", "other/c"]),
        (["a", "a"], ["a (1)", "a (2)"]),
    ],
)
def test_names(folders, names):
    assert names_of([Path(folder) for folder in folders]) == names


# --- what the page is


def test_it_asks_for_nothing_and_no_name_comes_twice(tmp_path):
    found = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"), output=tmp_path / "report.html")
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "img", "object", "embed"), tag
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in found.text and set(re.findall(r"url\(([^)]*)\)", found.text)) <= {
        f"#{name}" for name in found.ids
    }
    assert sorted(found.ids) == sorted(set(found.ids))
    charts = [attributes for tag, attributes in found.elements if tag == "svg" and attributes["class"] == "chart"]
    assert len(charts) > 12
    for attributes in charts:
        assert attributes["role"] == "img" and set(attributes["aria-labelledby"].split()) <= set(found.ids)
    assert (
        not set(re.findall(r"#[0-9a-f]{6}", found.text))
        - {*LIGHT.values(), *DARK.values()}
        - set(re.findall(r"#[0-9a-f]{6}", Path(page_module.__file__).with_name("page.css").read_text()))
    ), "a colour that no theme changes"


def test_what_a_run_brings_along_is_quoted(tmp_path):
    folder = tmp_path / EVIL  # which is two folders, one in the other
    write_run(folder, model=EVIL, layers=[EVIL] * 4, device=EVIL, versions={EVIL: EVIL}, **{"zero_stage": EVIL})
    run_log.append(
        folder, "evaluation", model=EVIL, adapter=EVIL, results={EVIL: {"exact_match": 1, "count": 1}}, step=1
    )
    run_log.append(folder, "end", step=60, error=EVIL)
    for folders in ([folder], [folder, write_run(tmp_path / r"$\frac$")]):
        found = report(*folders, output=tmp_path / "report.html")
        assert found.numbers[0]["name"].endswith(EVIL) and found.numbers[0]["start"]["model"] == EVIL
        assert len(found.scripts) == 1 and "<script>alert" not in found.text
        assert [attributes.get("type") for tag, attributes in found.elements if tag == "script"] == ["application/json"]
    assert len(found.elements) > 1000, "nothing was cut off"


def test_pictures_lie_beside_it(tmp_path):
    report(write_run(tmp_path / "run"), output=tmp_path / "there" / "page.html")
    pictures = sorted(path.name for path in (tmp_path / "there" / "page-pictures").iterdir())
    assert {"loss.png", "phases.png", "experts-0.png", "memory-host.png"} <= set(pictures)
    assert all((tmp_path / "there" / "page-pictures" / name).read_bytes()[1:4] == b"PNG" for name in pictures)


# --- runs that go on


def test_states(tmp_path):
    run = write_run(tmp_path / "run", end=False)
    assert read_run(run, "run").state() == "going on"
    set_back(run, 700)
    assert read_run(run, "run").state() == "silent"
    write_reading(run, 70, 1.0)
    assert read_run(run, "run").state() == "going on"
    run_log.append(run, "end", step=70, error="KeyError")
    assert read_run(run, "run").state() == "failed"
    run_log.append(run, "start", **start_of(step=60))
    assert read_run(run, "run").state() == "going on"


def test_it_follows_a_run_to_its_end(tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "report.html"
    codes: list[int] = []
    arguments = ["report", str(run), "--output", str(output), "--watch", "0.05"]
    follower = threading.Thread(target=lambda: codes.append(main(arguments)), daemon=True)
    follower.start()
    write_run(run, end=False)

    def wait_for(words: str) -> str:
        for _ in range(1200):
            text = output.read_text(encoding="utf-8") if output.exists() else "<!doctype html></html>"
            assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>"), "half a page"
            if words in text:
                return text
            time.sleep(0.05)
        raise AssertionError(f"{words} never came")

    assert '<meta http-equiv="refresh" content="1">' in wait_for("step 60")
    write_reading(run, 70, 1.0)
    wait_for("step 70")
    run_log.append(run, "end", step=70, error=None)
    follower.join(60)
    assert codes == [0]
    assert "http-equiv" not in wait_for("finished"), "it is not loaded again for ever"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report-pictures", "report.html", "run"]


def test_a_page_that_nobody_writes_again_is_not_loaded_again(tmp_path):
    found = report(write_run(tmp_path / "run", end=False), output=tmp_path / "report.html")
    assert "in training" in found.text and "http-equiv" not in found.text


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["RUN = nowhere has no log", "monitor.folder"]),
        (["run", "--watch", "0"], ["--watch = 0", "more than 0"]),
        (
            ["run", "--output", "run/meft_log.jsonl/x.html"],
            ["--output = run/meft_log.jsonl/x.html", "name another file"],
        ),
    ],
)
def test_mistakes_get_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_matplotlib_is_asked_for_by_its_name(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"from meft_engine.cli import main; sys.exit(main(['report', {str(write_run(tmp_path))!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 2 and "pip install 'meft-engine[report]'" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_command_starts_without_what_it_does_not_need(tmp_path):
    code = (
        "import sys; from meft_engine.cli import main; main(['report', 'nowhere'])\n"
        "print(sorted({'matplotlib', 'deepspeed', 'transformers', 'triton'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


# --- many runs


def asked_once(folder: Path, score: float) -> Path:
    """A run that ``evaluate.py`` was asked about after training alone, and that saves half the time."""
    run_log.append(folder, "start", **start_of())
    for step in (10, 20, 30):
        write_reading(folder, step, step * 1.5, **{"seconds/backward": 0.2, "seconds/save": 0.6})
    results = {name: {"exact_match": value, "f1": 1.0, "count": 8} for name, value in (("a", score), ("b", 1.0))}
    run_log.append(folder, "evaluation", model="a model", adapter="a", results=results, step=30)
    return folder


def test_what_was_asked_once_has_a_bar_for_each_run(tmp_path):
    runs = [read_run(asked_once(tmp_path / f"{n}", n / 4), f"{n}") for n in range(3)]
    chart = charts.exact_match(runs)
    (axes,) = chart.figure().axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [0, 0.25, 0.5, 1, 1, 1] and not len(axes.lines)
    assert [key.label for key in chart.legend] == ["a", "b"]
    write_run(tmp_path / "3")
    chart = charts.exact_match([*runs, read_run(tmp_path / "3", "3")])
    assert len(chart.figure().axes[0].lines), "a run that was asked twice has a line"


def test_saving_is_no_part_of_a_step(tmp_path):
    runs = [asked_once(tmp_path / name, 0.5) for name in "ab"]
    found = report(*runs, output=tmp_path / "report.html")
    (_, header, first, _) = found.tables["runs"]
    assert first[-len(header) :][header.index("a step")] == pytest.approx(0.61)
    assert ["saving", 0.6, 0.6] in found.tables["phases"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("baseline", "baseline"),
        ("000-rows2048-learning_rate0.0005-seed0", "000-rows2048-l…5-seed0"),
        ("experiments-of-tuesday-a", "experiments-of…esday-a"),
    ],
)
def test_a_long_name_keeps_its_beginning_and_its_end(name, short):
    assert charts.shortened(name, 22) == short and len(short) <= 22
