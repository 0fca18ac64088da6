"""docs/results.md is what the committed results make of it, and leaves none of them out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import quality_page
import results_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_is_that_of_the_results():
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(), "run `make results`"


def test_every_table_of_results_is_on_the_page():
    page = results_page.page()
    for path in (*RESULTS.glob("*.csv"), *RESULTS.glob("*.txt")):
        assert f"(../benchmarks/results/{path.name})" in page, f"{path.name} is in no section of results_page.py"
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_every_section_names_a_command_that_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for section in results_page.SECTIONS:
        if not section.text():
            continue
        assert section.command.removeprefix("make ") in targets
        assert section.text().count(f"`{section.command}`") == 1


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plan.csv").write_text("case,figure,predicted,measured,off,target,facts\na,host,1,2,-0.5,0.1,{}\n")
    (tmp_path / "gpu.csv").write_text("stage,figure,value,card\nfit24,meft_peak_gb,,H100\n")
    monkeypatch.setattr(quality_page, "RESULTS", tmp_path)
    page = results_page.page()
    assert page.count("not yet") == len(results_page.SECTIONS) - 2
    assert "| a | host | 1 | 2 | -0.5 | 0.1 |" in page
    assert "| fit24 | meft_peak_gb | – | H100 |" in page and "Of the present code no figure" not in page


def test_the_readme_ends_with_pictures_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ending = readme.partition("\n## Results\n")[2]
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", ending)
    assert len(pictures) == 3 and all((ROOT / picture).is_file() for picture in pictures)
    assert "(docs/results.md)" in ending
