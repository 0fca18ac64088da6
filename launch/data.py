"""Where examples come from: a file, a folder or a dataset of the hub, whole or streamed, with or without validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that says what would help."""


@dataclass(frozen=True)
class Source:
    """One set of examples, and what messages call it."""

    place: str
    """A file, a folder (as ``save_to_disk`` writes it, or of data files) or the name of a dataset on the hub."""
    config: str | None = None
    """Which configuration of a hub's dataset."""
    split: str = "train"
    """Which part, where there are several."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"data {self.place!r}" if self.split == "train" else f"split {self.split!r} of data {self.place!r}"


def read(source: Source, *, streaming: bool = False) -> Dataset | IterableDataset:
    """The examples of a source.

    Raises:
        DataError: if there are none, or they cannot be read.
    """
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    path = Path(source.place)
    try:
        if path.is_file():
            data = _read_file(path, streaming)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
            data = _part(data, source) if isinstance(data, datasets.DatasetDict) else data
            data = data.to_iterable_dataset() if streaming else data
        elif path.is_dir() or not _looks_like_a_path(source.place):
            data = datasets.load_dataset(source.place, source.config, split=source.split, streaming=streaming)
        else:
            raise DataError(f"{source.name} does not exist; give a file, a folder or the name of a dataset on the hub")
        first = next(iter(data), None)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, most with the reason in their cause
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{source.name} cannot be read ({reason[0].rstrip('.')}); give a readable {', '.join(READERS)} file, "
            "folder or dataset name"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    if first is None:
        raise DataError(f"{source.name} is empty; it needs at least one example")
    return data


def columns_of(data: Dataset | IterableDataset) -> list[str]:
    """Names of the columns, which a stream shows only by its first example."""
    return list(data.column_names or next(iter(data)))


def hold_out(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Examples to train on, and a random share of them to validate with.

    Raises:
        DataError: if either would be empty.
    """
    count = round(len(data) * share)
    if not 0 < count < len(data):
        raise DataError(
            f"eval_share = {share:g} of {len(data)} examples leaves {count} to validate with and {len(data) - count} "
            "to train on; choose a share that leaves some of both"
        )
    parts = data.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _read_file(path: Path, streaming: bool) -> Any:
    import datasets

    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"data {str(path)!r} is none of the files that can be read ({known}); convert or rename it")
    if not path.stat().st_size:
        raise DataError(f"data {str(path)!r} is empty; it needs at least one example")
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=streaming)


def _part(parts: Any, source: Source) -> Any:
    if source.split not in parts:
        known = ", ".join(map(repr, parts))
        raise DataError(f"data {source.place!r} has no split {source.split!r}; it has {known}")
    return parts[source.split]


def _looks_like_a_path(place: str) -> bool:
    return place.startswith((".", "/", "~")) or Path(place).suffix in READERS or place.count("/") > 1
