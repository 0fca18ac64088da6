"""From a sweep's file to its runs, each with its resolved JSON and arguments, checked before anything starts."""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data import DataError
from sweep_file import ARGUMENTS, SweepFile

from meft_engine.checkpoint.folders import PARTIAL, write_text
from meft_engine.config import BLOCK, MeftConfigError, find_block

CONFIG, ARGUMENTS_FILE, ANSWERS = "ds_config.json", "arguments.json", "answers.jsonl"
SEED_KEYS = (f"{ARGUMENTS}seed", f"{BLOCK}.adapter.seed")

FOLLOWS = {
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_epsilon": "optimizer.params.eps",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "max_grad_norm": "gradient_clipping",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
}
"""Arguments that transformers wants to be equal to a key of the JSON; one that is not given follows the JSON."""


@dataclass(frozen=True)
class Run:
    """One run: what it trains with, and what it is called."""

    settings: dict[str, Any]
    """By their keys, what it differs in from other runs."""
    config: dict[str, Any]
    """The DeepSpeed JSON."""
    arguments: dict[str, Any]
    """Options of the script."""
    script: str
    evaluate: dict[str, Any] | None
    """``data`` and ``arguments`` of ``launch/evaluate.py``."""

    @property
    def name(self) -> str:
        """A short one, of letters that need no quoting anywhere."""
        parts = [f"{key.rpartition('.')[2]}{_short(value)}" for key, value in self.settings.items()]
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts)).strip("_.-")[:60] or "run"

    def identity(self) -> dict[str, Any]:
        """Everything that its results depend on, by dotted keys."""
        arguments = {f"{ARGUMENTS}{key}": value for key, value in self.arguments.items()}
        others = {"base.script": self.script, "evaluate": self.evaluate}
        return {**dict(_flat(self.config)), **arguments, **others}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else Path(value).name if isinstance(value, str) else str(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expand(file: SweepFile) -> list[Run]:
    """All runs: entries of ``list``, times points of ``grid``, times ``seeds``; the last varies fastest.

    Raises:
        DataError: if the JSON cannot be read, a key cannot be set in it, two runs are equal or there are too many.
    """
    config = _read_json(file.base.config)
    points = [dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())]
    runs = []
    for entry, point, seed in itertools.product(file.list_ or [{}], points, file.seeds or [None]):
        settings = {**entry, **point}
        seeds = {} if seed is None else {key: seed for key in SEED_KEYS if key not in settings}
        runs.append(_resolve(file, config, settings, seeds))
        if seed is not None:
            runs[-1].settings["seed"] = seed
    seen: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        if run.identity() in seen:
            raise DataError(
                f"runs {seen.index(run.identity())} and {i} are the same ({run.name}); list each setting once"
            )
        seen.append(run.identity())
    if file.budget.runs is not None and len(runs) > file.budget.runs:
        raise DataError(
            f"budget.runs = {file.budget.runs} is less than the {len(runs)} runs that list, grid and seeds make; raise "
            "it, or list fewer values"
        )
    return runs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"base.config = {str(path)!r} is no JSON ({error}); give a DeepSpeed JSON") from None
    if not isinstance(config, dict):
        raise DataError(f"base.config = {str(path)!r} holds no object; give a DeepSpeed JSON")
    return config


def _resolve(file: SweepFile, base: Mapping[str, Any], settings: dict[str, Any], seeds: dict[str, int]) -> Run:
    config, arguments = copy.deepcopy(dict(base)), dict(file.base.arguments)
    for key, value in {**settings, **seeds}.items():
        if key.startswith(ARGUMENTS):
            arguments[key.removeprefix(ARGUMENTS)] = value
        elif key in settings or BLOCK in config:
            _set(config, key, value)
    flat = dict(_flat(config))
    for name, key in FOLLOWS.items():
        if name not in arguments and isinstance(flat.get(key), int | float):
            arguments[name] = flat[key]
    evaluate = None
    if file.evaluate is not None:
        evaluate = {"data": [str(path) for path in file.evaluate.data], "arguments": file.evaluate.arguments}
    return Run(dict(settings), config, arguments, str(file.base.script), evaluate)


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    top = parents[0] if parents else last
    if top not in config:
        guess = difflib.get_close_matches(top, [BLOCK, *config], n=1, cutoff=0.7)
        if guess and guess[0] != top:
            raise DataError(f"{key} begins with {top!r}, which base.config does not have; did you mean {guess[0]!r}?")
    place = config
    for depth, parent in enumerate(parents):
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise DataError(
                f"{key} cannot be set: {'.'.join(parents[: depth + 1])} = {place!r} in base.config is no object; name "
                "that key itself"
            )
    place[last] = value


def check(runs: Sequence[Run]) -> None:
    """Validate the JSON of every run, parse its arguments as ``finetune.py`` does, and read what it is asked then.

    Raises:
        DataError: one sentence that names the run, the field, the value and the remedy.
    """
    parser = None
    for run in runs:
        try:
            find_block(run.config)
            _require_equal(run)
            if Path(run.script).name == "finetune.py":
                parser = parser or _parser()
                parser.parse([*command_options(run, "runs/checked"), *_anywhere()])
        except (DataError, MeftConfigError) as error:
            raise DataError(f"run {run.name}: {error}") from None
    if runs and runs[0].evaluate is not None:  # that of all
        _check_evaluation(runs[0])


def _check_evaluation(run: Run) -> None:
    import evaluate

    parser = evaluate.make_parser()
    parser.error = _refuse
    try:
        evaluate.load_questions(evaluate.parse_arguments(evaluation_options(run, "runs/checked"), parser))
    except DataError as error:
        raise DataError(f"evaluate: {error}") from None


def _refuse(message: str) -> NoReturn:
    raise DataError(message)


def command_options(run: Run, folder: str) -> list[str]:
    """The script's options, its output folder among them; the DeepSpeed JSON is named where it is started."""
    from launcher import options

    values = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in run.arguments.items()}
    return options({**values, "output_dir": folder})


def evaluation_options(run: Run, folder: str) -> list[str]:
    """Those of ``evaluate.py``, for what the run has left in its folder: an adapter, or without one a whole model."""
    from launcher import options

    base = str(run.arguments.get("model_name_or_path", ""))
    adapted = find_block(run.config) is not None
    model = {"model": base, "adapter": folder, "log": folder} if adapted else {"model": folder}
    arguments = {"predictions": f"{folder}/{ANSWERS}", **run.evaluate["arguments"]}
    values = {name: value for name, value in arguments.items() if not isinstance(value, bool)}
    flags = [f"--{name}" for name, value in arguments.items() if value is True]
    return [*options({**model, **values, "data": run.evaluate["data"]}), *flags]


def _require_equal(run: Run) -> None:
    """What transformers would refuse only once it has loaded the model."""
    flat = dict(_flat(run.config))
    for name, key in FOLLOWS.items():
        value, given = flat.get(key, "auto"), run.arguments.get(name)
        if given is not None and isinstance(value, int | float) and value != given:
            raise DataError(
                f"arguments.{name} = {given!r} and {key} = {value!r} of the JSON have to be equal; write "
                f'"auto" there, or leave the argument out'
            )


def _parser() -> Any:
    from finetune_arguments import Parser

    class Checking(Parser):
        """Mistakes are raised in place of being printed."""

        def error(self, message: str) -> NoReturn:
            """As for the other script."""
            _refuse(message)

    return Checking()


def _anywhere() -> list[str]:
    """Runs may be planned where there is no GPU, as on a login node."""
    import torch

    return [] if torch.cuda.is_available() else ["--use_cpu=True"]


# Folders


def read_run(folder: Path) -> Run:
    """The run that a folder was made for."""
    content = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    return Run(config=json.loads((folder / CONFIG).read_text(encoding="utf-8")), **content)


def existing(output: Path) -> list[Path]:
    """The folders of runs in a sweep's folder, in order."""
    found = [path for path in output.glob("*-*") if re.fullmatch(r"\d{3,}-.*", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[0]))


def match(runs: Sequence[Run], output: Path) -> list[Path]:
    """A folder for each run, those that exist included; the others are to be made.

    Raises:
        DataError: if a run that exists is not among them any more, naming the difference.
    """
    wanted = {i: _plain(run.identity()) for i, run in enumerate(runs)}
    folders: dict[int, Path] = {}
    gone = []
    there = existing(output)
    for folder in there:
        identity = _plain(read_run(folder).identity())
        found = next((i for i, other in wanted.items() if other == identity and i not in folders), None)
        if found is None:
            gone.append((folder, identity))
        else:
            folders[found] = folder
    if gone:
        raise DataError(_difference(*gone[0], [other for i, other in wanted.items() if i not in folders]))
    free = itertools.count(int(there[-1].name.partition("-")[0]) + 1 if there else 0)
    return [folders.get(i) or output / f"{next(free):03d}-{run.name}" for i, run in enumerate(runs)]


def _difference(folder: Path, identity: dict[str, Any], candidates: list[dict[str, Any]]) -> str:
    remedy = f"take another --output, or the former file for {folder.parent}"
    if not candidates:
        return f"{folder} is there and the file has no such run any more; {remedy}"
    differing = []
    for other in candidates:
        keys = sorted({*identity, *other})
        differing.append([(k, identity.get(k), other.get(k)) for k in keys if identity.get(k) != other.get(k)])
    key, old, new = min(differing, key=len)[0]
    return f"{folder} was made with {key} = {old!r}, and the file says {new!r}; {remedy}"


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As it is after it was written and read."""
    return json.loads(json.dumps(identity))


def make_folder(run: Run, folder: Path) -> None:
    """Write a run's folder, which is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    content = {"settings": run.settings, "arguments": run.arguments, "script": run.script, "evaluate": run.evaluate}
    write_text(partial / CONFIG, json.dumps(run.config, indent=2) + "\n")
    write_text(partial / ARGUMENTS_FILE, json.dumps(content, indent=2) + "\n")
    os.rename(partial, folder)
