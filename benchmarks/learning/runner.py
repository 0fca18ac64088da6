"""Conducts many trials, one on each core, and keeps what each found: an interrupted run goes on where it stopped."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from learning.trial import Trial
from meft_engine.cores import rank_cores
from meft_kernels.cpu import build

_ROOT = Path(__file__).resolve().parents[2]
# What a trial's result depends on besides its settings: files, and folders with all that is in them.
_SOURCES = (
    *("meft_engine", "kernels", "launch/collator.py", "launch/facts.py", "launch/formats.py"),
    *(f"benchmarks/learning/{name}.py" for name in ("conduct", "corpus", "methods", "sparsity", "top_layers", "trial")),
    *("benchmarks/learning/variants.py", "benchmarks/learning/text.txt"),
)

_STALLED_SECONDS = 1800
"""Longer than any trial takes; a worker then prints where it is, and goes on."""


@dataclass(frozen=True)
class Result:
    """A trial and what it found."""

    trial: Trial
    found: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.found[name]


class Runner:
    """Conducts trials in processes of one core each.

    Args:
        model: folder of the base model. first_layer: the lowest layer with an adapter.
        folder: of what is kept. cores: on which trials run.
        any_code: take results that other code has found; without it they are found again.
    """

    def __init__(
        self, model: str, first_layer: int, folder: Path, cores: Sequence[int] | None = None, any_code: bool = False
    ) -> None:
        self._model, self._first_layer, self._folder = model, first_layer, folder
        self._cores = list(cores or sorted(rank_cores()))
        self._any_code, self._code = any_code, _digest_of_sources()
        self._corpora: dict[int, Path] = {}

    def run(self, trials: Iterable[Trial], title: str) -> list[Result]:
        """The results of ``trials``, in their order; those that are known already are only read."""
        trials = list(trials)
        missing = [trial for trial in dict.fromkeys(trials) if self._known(trial) is None]
        if missing:
            self._conduct(missing, title)
        return [Result(trial, self._known(trial)) for trial in trials]

    def _conduct(self, trials: list[Trial], title: str) -> None:
        from learning import corpus

        for facts in sorted({trial.facts for trial in trials} - self._corpora.keys()):
            self._corpora[facts] = corpus.build(self._model, facts, self._first_layer, self._folder)
        os.environ["DS_ACCELERATOR"] = "cpu"  # of the processes to come, also where there is a GPU
        build.library()  # compiled once, with all cores, before each worker asks for it
        context = multiprocessing.get_context("spawn")
        free_cores = context.Queue()
        for core in self._cores:
            free_cores.put(core)
        with ProcessPoolExecutor(
            len(self._cores), mp_context=context, initializer=_settle, initargs=(free_cores,)
        ) as pool:
            pending: dict[Future, Trial] = {
                pool.submit(_conduct_one, trial, self._corpora[trial.facts], self._model, self._first_layer): trial
                for trial in trials
            }
            with tqdm(total=len(trials), desc=title, unit="trial", smoothing=0) as bar:
                try:
                    for future in as_completed(pending):
                        self._keep(pending[future], future.result())
                        bar.update()
                        bar.write(one_line(Result(pending[future], future.result())), file=sys.stdout)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _path(self, trial: Trial) -> Path:
        return self._folder / "trials" / f"{trial.key}.json"

    def _known(self, trial: Trial) -> dict[str, Any] | None:
        path = self._path(trial)
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["found"] if self._any_code or kept["code"] == self._code else None

    def _keep(self, trial: Trial, found: dict[str, Any]) -> None:
        path = self._path(trial)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"code": self._code, "trial": asdict(trial), "found": found}), encoding="utf-8")
        partial.replace(path)


def one_line(result: Result) -> str:
    """What a trial was and found, for people."""
    trial = result.trial
    line = (
        f"{trial.method:<5} {trial.settings:<40} lr {trial.learning_rate:<7g} seed {trial.seed}: "
        f"exact match {result['trained_exact_match']:.3f}, second wording {result['second_wording_exact_match']:.3f}, "
        f"perplexity {result['perplexity_after']:.1f}"
    )
    if "text_touched" in result.found:
        line += f", touched {result['touched_by_epoch'][-1]:.1%}, by text {result['text_touched']:.1%}"
    return f"{line}, {result['wall_seconds']:.0f} s"


def _settle(free_cores: Any) -> None:
    """Make this process one of one core."""
    faulthandler.enable()
    # A worker would outlive a run that is killed, go on with its trial, and then wait forever.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    core = free_cores.get()
    os.sched_setaffinity(0, {core})
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    tools = str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    import logging

    logging.disable(logging.WARNING)
    import deepspeed
    import torch
    import transformers

    # One rank has nothing to reduce; else every worker would wait minutes for this to be compiled on one core.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)  # it may have been imported before the variable was set
    transformers.utils.logging.disable_progress_bar()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _conduct_one(trial: Trial, corpus_file: Path, model: str, first_layer: int) -> dict[str, Any]:
    from learning.conduct import conduct

    start = time.perf_counter()
    faulthandler.dump_traceback_later(_STALLED_SECONDS, repeat=True)  # else nobody would know where it stands still
    try:
        found = conduct(trial, corpus_file, model, first_layer)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return {**found, "wall_seconds": time.perf_counter() - start}


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        place = _ROOT / source
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in {".py", ".cpp", ".h", ".txt"}:
                digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
