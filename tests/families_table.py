"""Writes which behaviour holds for which family of models: a table for people, from the tests as they ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

_HEAD = """# Families and behaviours

Written by `make test-families` from the tests in `tests/integration/` that are marked as a behaviour. They run over
tiny models with random weights.
"""


class FamiliesTable:
    """Collects the outcomes of tests that have a ``behaviour`` mark and run over a ``family``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, dict[str, bool]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        """Note a test's outcome; a behaviour holds if all of its tests do."""
        report = yield
        mark = item.get_closest_marker("behaviour")
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if mark and family and (report.when == "call" or not report.passed):
            row = self._held.setdefault(family, {})
            row[mark.args[0]] = row.get(mark.args[0], True) and report.passed
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        behaviours = list(dict.fromkeys(name for row in self._held.values() for name in row))
        lines = [f"| | {' | '.join(behaviours)} |", "|---|" + ":-:|" * len(behaviours)]
        for family, row in self._held.items():
            cells = ["" if name not in row else "✓" if row[name] else "**fails**" for name in behaviours]
            lines.append(f"| {family} | {' | '.join(cells)} |")
        self._path.write_text(_HEAD + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
