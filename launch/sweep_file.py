"""The YAML file of a sweep: its fields, their meaning and their limits.

Every mistake is one sentence that names the field, the value and what would be right. YAML is read as version 1.2 has
it: ``1e-3`` is a number, ``no`` and ``off`` are words, and a key stands once.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from data import DataError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

HERE = Path(__file__).resolve().parent
ARGUMENTS = "arguments."
"""What keys of training arguments begin with; all others are keys of the DeepSpeed JSON."""
RESERVED = {
    "output_dir": "each run has a folder of its own below --output",
    "deepspeed": "base.config names it",
    "resume_from_checkpoint": "a run goes on by itself",
    "local_rank": "the launcher sets it",
    "use_cpu": "resources.gpus = 0 does that",
}
"""Training arguments that are the sweep's, and why."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Section):
    """What all runs have in common."""

    config: Path
    """The DeepSpeed JSON."""
    script: Path = HERE / "finetune.py"
    """What trains. Another script than ``launch/finetune.py`` is started through ``meft_engine.run``."""
    arguments: dict[str, Any] = {}
    """Its options."""

    @field_validator("config", "script")
    @classmethod
    def _exists(cls, path: Path) -> Path:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} does not exist; give a file (paths start from the working directory)")
        return path.resolve()

    @field_validator("arguments")
    @classmethod
    def _allowed(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            _require_free(name)
        return arguments


class Budget(_Section):
    """How much may be spent; ``null`` is no limit."""

    runs: int | None = Field(None, ge=1)
    """A sweep of more runs is refused."""
    hours_per_run: float | None = Field(None, gt=0)
    """Of a run's training, all its attempts together; then it saves and stops."""
    hours_total: float | None = Field(None, gt=0)
    """Of all runs together."""


class SlurmResources(_Section):
    """What is asked of Slurm; the fields are named as sbatch names them."""

    partition: str | None = None
    time: int | str = 60
    """Of one attempt: minutes, or ``hours:minutes:seconds``, or ``days-hours:minutes:seconds``."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = Field(None, ge=1)
    mem: str | None = None
    """Memory of a node, such as ``64G``."""
    exclusive: bool = False
    parallel: int = Field(256, ge=1)
    """Runs at a time."""
    signal_seconds: int = Field(120, ge=10)
    """How long before the end of ``time`` a run is told to save."""
    requeues: int = Field(20, ge=0)
    """How often a run that was out of time may be queued again."""

    @field_validator("partition", "account", "qos", "constraint", "mem", "time")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        # A second line would be a line of the batch script by itself.
        if isinstance(value, str) and (not value.strip() or not value.isprintable()):
            raise ValueError(f"{value!r} is not a line of text; write it without line breaks or control characters")
        return value

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: int | str) -> int | str:
        if not re.fullmatch(r"[1-9]\d*|(\d+-)?\d+:\d\d:\d\d", str(value)):
            raise ValueError(f'{value!r} is no time; write minutes such as 90, or "1:30:00", or "2-00:00:00"')
        return value

    @property
    def minutes(self) -> int:
        """``time`` in minutes, rounded up."""
        days, _, clock = str(self.time).rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if len(parts) == 1:
            return parts[0]
        hours, minutes, seconds = parts
        return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


class Resources(_Section):
    """What one run gets."""

    gpus: int = Field(1, ge=0)
    """Ranks of a node, a GPU each; 0: one rank a node, on its CPU."""
    nodes: int = Field(1, ge=1)
    """More than one only with Slurm."""
    slurm: SlurmResources = SlurmResources()


class Evaluate(_Section):
    """What ``launch/evaluate.py`` measures after a training."""

    data: list[Path] = Field(min_length=1)
    """Files of questions."""
    arguments: dict[str, Any] = {}
    """Other options of the script."""

    @field_validator("data", mode="before")
    @classmethod
    def _as_list(cls, data: Any) -> Any:
        return [data] if isinstance(data, str) else data

    @field_validator("data")
    @classmethod
    def _exist(cls, data: list[Path]) -> list[Path]:
        for path in data:
            if not path.is_file():
                raise ValueError(f"{str(path)!r} does not exist; give a file with prompts and completions")
        if len({path.stem for path in data}) < len(data):
            raise ValueError(f"{[str(path) for path in data]} has two files of one stem; results are listed by stem")
        return [path.resolve() for path in data]

    @field_validator("arguments")
    @classmethod
    def _allowed(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in {"model", "adapter", "data", "log", "predictions"} & arguments.keys():
            raise ValueError(f"{name} is set by the sweep; leave it out")
        return arguments


class SweepFile(_Section):
    """The whole file."""

    base: Base
    grid: dict[str, list[Any]] = {}
    """Keys and their values; every combination is a run."""
    list_: list[dict[str, Any]] = Field([], alias="list")
    """Settings that go together; each is combined with every point of the grid."""
    seeds: list[int] = []
    """Each run is repeated with each; sets ``arguments.seed`` and ``meft.adapter.seed``."""
    budget: Budget = Budget()
    resources: Resources = Resources()
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is empty; give at least one value, or leave the key out")
        for place, keys in (("grid", self.grid), *((f"list.{i}", entry) for i, entry in enumerate(self.list_))):
            for key in keys:
                if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key) or key == ARGUMENTS.rstrip("."):
                    raise ValueError(
                        f"{place} has the key {key!r}; write a dotted one such as meft.adapter.rows or "
                        "arguments.learning_rate"
                    )
                if key.startswith(ARGUMENTS):
                    _require_free(key.removeprefix(ARGUMENTS))
                if place != "grid" and key in self.grid:
                    raise ValueError(f"{key} stands in grid and in {place}; leave it out of one of them")
                if self.seeds and key == f"{ARGUMENTS}seed":
                    raise ValueError(f"{key} stands in {place} beside seeds; leave it out of one of them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} has one twice; name each once")
        return self


def read(path: Path) -> SweepFile:
    """Read and validate a sweep's file.

    Raises:
        DataError: one sentence that names the field, the value and the remedy.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the YAML file of a sweep") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML ({' '.join(str(error).split())}); correct it there") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no mapping; it needs at least base with config and arguments")
    try:
        return SweepFile.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {_one_sentence(error)}") from None


class _Loader(yaml.SafeLoader):
    """Safe, and by the core schema of YAML 1.2: in 1.1, ``1e-3`` is text, ``no`` is false, ``1:30:00`` is 5400."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As ever; but a key that stands twice is refused."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", None),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first or list("-+.0123456789")
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _require_free(name: str) -> None:
    if name in RESERVED:
        raise ValueError(f"arguments.{name} is set by the sweep ({RESERVED[name]}); leave it out")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"arguments.{name} is no name of an option; write it without dashes, as learning_rate")


def _one_sentence(error: ValidationError) -> str:
    """Pydantic's first complaint in the words of a user of the YAML."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    where = ".".join(part for part in parts if part not in ("int", "str"))
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{where} is missing; the file needs it"
    if first["type"] == "extra_forbidden":
        section: Any = SweepFile
        for part in parts[:-1]:
            annotation = section.model_fields[part].annotation
            section = next((a for a in getattr(annotation, "__args__", ()) if a is not type(None)), annotation)
        names = sorted(field.alias or name for name, field in section.model_fields.items())
        guess = difflib.get_close_matches(parts[-1], names, n=1)
        remedy = f"did you mean {guess[0]}?" if guess else f"the fields there are {', '.join(names)}"
        return f"there is no field {where} (= {first['input']!r}); {remedy}"
    return f"{where} = {first['input']!r} is not valid: it {first['msg'].removeprefix('Input ').strip()}"
