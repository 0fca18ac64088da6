"""Which checkpoint of ``transformers.Trainer`` a run can go on from."""

from __future__ import annotations

import json
from pathlib import Path

from meft_engine.checkpoint import folders

_STATE = "trainer_state.json"


def newest_whole(output_dir: Path | str) -> Path | None:
    """The ``checkpoint-<step>`` of most steps that is there whole, or ``None``.

    Whole is one whose trainer_state.json can be read and whose DeepSpeed checkpoint has all files of its manifest in
    their sizes (contents are checked when it is loaded). Plain DeepSpeed writes no manifest: there, the folder that
    ``latest`` names has to be there.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdecimal() and _is_whole(folder):
            found.append((int(step), folder))
    return max(found)[1] if found else None


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tag = (folder / folders.LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False
    saved = folder / tag
    if (saved / folders.SUBFOLDER).is_dir():
        return saved in folders.whole_ones(folder)
    return bool(tag) and saved.is_dir()
