"""A checkpoint with more or with fewer rows: what stays, stays bit for bit, and training goes on from it."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import resize as command
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import meft_engine
from meft_engine import MeftConfigError
from meft_engine.adapter.initialize import initial_keys, seed_of_layer
from meft_engine.adapter.module import SparseAdapter
from meft_engine.checkpoint import folders, resized_rows, shards
from meft_engine.checkpoint.resize import grow, kept_rows, prune
from meft_engine.checkpoint.saver import CheckpointSaveError
from meft_engine.checkpoint.snapshot import Block
from meft_engine.checkpoint.tensor_files import SafetensorsStream
from meft_engine.offload.memory import pieces
from meft_kernels import planes, reference
from tests.families import VOCAB, fill_values, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, full_state, row_state, train_step

ROWS, EXPERTS, STEPS = 35, 5, 3
LAYERS = 3
ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
ROOT = Path(__file__).parents[2]
TEXT = [{"input_ids": batch(seed, size=2, length=9), "use_cache": False} for seed in (50, 51)]
SHORT_TEXT = [{"input_ids": batch(60, size=1, length=3), "use_cache": False}]


@dataclass(frozen=True)
class Kind:
    """How the engine of a checkpoint is configured."""

    mode: str = "lazy"
    bf16: bool = False
    moments: str = "fp32"
    top_k: int = 3

    def engine(self, rows: int = ROWS) -> Any:
        """Untrained, with so many rows."""
        shape = {"rows": rows, "center_inputs": True, "init_keys": "ffn", "top_k": self.top_k}
        block = tiny_block(shape, optimizer={"mode": self.mode, "moments_dtype": self.moments})
        return build_engine(tiny_llama(), block, stage=2 if self.bf16 else 0, bf16=self.bf16, adam=ADAM)


KINDS = {
    "lazy, fp32": Kind(),
    "lazy, bf16": Kind(bf16=True),
    "dense_equivalent, fp32": Kind(mode="dense_equivalent"),
    "dense_equivalent, bf16": Kind(mode="dense_equivalent", bf16=True, moments="bf16"),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@dataclass(frozen=True)
class Saved:
    """A checkpoint after some steps, and what the engine held that wrote it."""

    folder: Path
    state: dict[str, Tensor]
    rows: dict[str, Tensor]
    """By table, brought to date and as the model reads them."""
    steps: dict[str, Tensor]

    @property
    def files(self) -> Path:
        return folders.find(self.folder, None) / "meft"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[Kind], Saved]:
    """One checkpoint of each kind."""

    @functools.cache
    def make(kind: Kind) -> Saved:
        folder = tmp_path_factory.mktemp("saved")
        engine = kind.engine()
        fill_values(engine.meft_adapters)
        torch.manual_seed(7)
        for step in range(STEPS):
            train_step(engine, [batch(step, size=1, length=6)])
        engine.save_checkpoint(str(folder))
        engine.synchronize_rows()
        optimizer = engine.row_optimizer
        current = {table.name: optimizer.current_masters(table).clone() for table in optimizer.tables()}
        steps = {table.name: optimizer.state[table.handle]["step"].clone() for table in optimizer.tables()}
        rows = {name: planes.rounded(table) if kind.bf16 else table for name, table in current.items()}
        return Saved(folder, full_state(engine), rows, steps)

    return make


class Defined(nn.Module):
    """``FFN(h)`` plus the definition of the adapter; keeps what each row's picks activated, [T, r]."""

    def __init__(self, ffn: nn.Module, keys: Tensor, values: Tensor, router: Tensor, **shape: Any) -> None:
        super().__init__()
        self.ffn, self.keys, self.values = ffn, keys, values
        self.adapter = functools.partial(reference.adapter, router=router, experts_per_token=2, gate="softmax", **shape)
        self.activations: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        self.activations.append(self.adapter(flat, self.keys, torch.eye(len(self.keys)))[0])
        return self.ffn(h) + (self.activations[-1] @ self.values).view(h.shape)


@torch.no_grad()
def defined(
    saved: Saved, rows: dict[str, Tensor], top_k: int, text: list[dict[str, Any]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """By the plain definition: the logits of every batch, and of every FFN the activations [T, r] over all batches."""
    model, small = tiny_llama().eval(), load_file(saved.files / "shared.safetensors")
    layers = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp"
        tables = rows[f"{name}/keys"], rows[f"{name}/values"]
        parent = model.model.layers[layer]
        layers[name] = parent.mlp = Defined(
            parent.mlp, *tables, small[f"{name}.router"].float(), top_k=top_k, center=small[f"{name}.center"]
        )
    logits = [model(**inputs).logits for inputs in text]
    return logits, {name: torch.cat(layer.activations) for name, layer in layers.items()}


def raw(files: Path) -> dict[tuple[str, str], Tensor]:
    """Everything in the files of rows, by table and kind, whatever file it is in."""
    parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for path in files.glob("rows-*"):
        for name, tensor in load_file(path).items():
            if not name.startswith("random_state"):
                table, kind, span = name.rsplit("/", 2)
                assert int(span.split("-")[1]) - int(span.split("-")[0]) == len(tensor)
                parts.setdefault((table, kind), []).append((int(span.split("-")[0]), tensor))
    return {key: torch.cat([t for _, t in sorted(found, key=lambda p: p[0])]) for key, found in parts.items()}


def grown_keys(layer: int, rows: int) -> Tensor:
    """[rows - 35, d]: what an adapter of so many rows starts with after its first 35."""
    weight = tiny_llama().model.layers[layer].mlp.gate_proj.weight
    return initial_keys(weight, rows, "ffn", seed_of_layer(42, layer))[ROWS:]


def grown(table: str, tensor: Tensor, rows: int) -> Tensor:
    """A table of 35 rows with new ones at the ends of its experts."""
    layer = int(table.split(".")[2])
    new = grown_keys(layer, rows) if table.endswith("keys") else torch.zeros(rows - ROWS, tensor.shape[1])
    parts = zip(tensor.view(EXPERTS, -1, tensor.shape[1]), new.view(EXPERTS, -1, tensor.shape[1]), strict=True)
    return torch.cat([torch.cat(part) for part in parts])


def brute_force(use: list[float], steps: list[int], rows: int) -> list[int]:
    """Which rows stay, one by one."""
    size, kept = len(use) // EXPERTS, []
    for expert in range(EXPERTS):
        own = range(expert * size, (expert + 1) * size)
        kept += sorted(own, key=lambda row: (-use[row], -steps[row], row))[: rows // EXPERTS]
    return sorted(kept)


def expected_kept(saved: Saved, kind: Kind, rows: int, text: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By FFN, the rows that stay according to the definition."""
    _, activations = defined(saved, saved.rows, kind.top_k, text)
    kept = {}
    for name, found in activations.items():
        use = found.double().sum(0) * saved.rows[f"{name}/values"].double().norm(dim=1)
        steps = saved.steps[f"{name}/values"].tolist() if kind.mode == "lazy" else [0] * ROWS
        kept[name] = brute_force(use.tolist(), steps, rows)
    return kept


def nothing_attached(model: nn.Module) -> bool:
    return not any(isinstance(module, SparseAdapter) for module in model.modules())


# What is written


def require_copied(one: Path, other: Path, rows: int) -> None:
    """All but rows is there bit for bit; the manifest and the description say what is new, and nothing else."""
    manifests = [json.loads((folder / folders.MANIFEST).read_text()) for folder in (one, other)]
    names = {name for name in manifests[0]["files"] if "rows-" not in name and "adapter_config" not in name}
    assert len(names) >= 2 and manifests[0]["files"].keys() == manifests[1]["files"].keys()
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    folders.require_whole(other, folders.read_manifest(other).files, manifests[1]["files"])
    for key in ("global_steps", "layout", "format"):
        assert manifests[0][key] == manifests[1][key]
    assert manifests[1]["tag"] == other.name
    descriptions = [json.loads((folder / "meft" / "adapter_config.json").read_text()) for folder in (one, other)]
    for description, count in zip(descriptions, (ROWS, rows), strict=True):
        assert description["meft"]["adapter"].pop("rows") == count
        assert description["meft"]["active_rows"].pop("cap") == count
    assert descriptions[0] == descriptions[1]


@each_kind
def test_growing_adds_rows_and_changes_nothing_else(kind, saved, tmp_path):
    former, rows = saved(kind), 50
    model = tiny_llama()
    resized = grow(model, former.folder, tmp_path, rows)
    assert (resized.former_rows, resized.rows, resized.num_experts) == (ROWS, rows, EXPERTS)
    assert resized.comparison is None and nothing_attached(model) and model.training
    require_copied(former.files.parent, resized.folder, rows)
    before, after = raw(former.files), raw(resized.folder / "meft")
    assert before.keys() == after.keys()
    for (table, name), tensor in after.items():
        by_expert = tensor.view(EXPERTS, 10, *tensor.shape[1:])
        old, new = by_expert[:, :7].flatten(0, 1), by_expert[:, 7:].flatten(0, 1)
        assert old.dtype == before[table, name].dtype and torch.equal(old, before[table, name])
        if name == "step":
            assert new.tolist() == [0 if kind.mode == "lazy" else STEPS] * 15
        elif table.endswith("keys") and name in ("compute", "low"):
            own = {"compute": grown_keys(int(table.split(".")[2]), rows)}
            if kind.bf16:
                own = dict(zip(("compute", "low"), planes.split(own["compute"]), strict=True))
            assert torch.equal(new, own[name])
        else:
            assert not new.any()
    random_states = [load_file(f / "rows-0-of-1.safetensors") for f in (former.files, resized.folder / "meft")]
    names = [name for name in random_states[0] if name.startswith("random_state")]
    assert names and all(torch.equal(random_states[0][name], random_states[1][name]) for name in names)


@each_kind
def test_pruning_keeps_what_brute_force_keeps(kind, saved, tmp_path):
    former, rows = saved(kind), 20
    kept = expected_kept(former, kind, rows, SHORT_TEXT)
    model = tiny_llama()
    resized = prune(model, former.folder, tmp_path, rows, batches=SHORT_TEXT)
    assert nothing_attached(model)
    require_copied(former.files.parent, resized.folder, rows)
    before, after = raw(former.files), raw(resized.folder / "meft")
    assert before.keys() == after.keys()
    for (table, name), tensor in after.items():
        assert torch.equal(tensor, before[table, name][kept[table.rsplit("/", 1)[0]]]), (table, name)
    if kind == Kind():  # else only use would be tested
        steps = former.steps["model.layers.0.mlp/values"].tolist()
        assert kept["model.layers.0.mlp"] != expected_kept(former, Kind(mode="other"), rows, SHORT_TEXT) and max(steps)


def test_ties_go_to_what_was_updated_more_often_and_then_to_the_lower_id():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        use, updates = (torch.randint(0, 3, (ROWS,), generator=generator) for _ in range(2))
        found = kept_rows(use.double(), updates.int(), EXPERTS, 20)
        assert found.tolist() == brute_force(use.tolist(), updates.tolist(), 20)


# What it computes


def largest_change(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def logits_of(folder: Path, text: list[dict[str, Any]]) -> list[Tensor]:
    model = meft_engine.load_adapter(tiny_llama().eval(), folder)
    return [model(**inputs).logits for inputs in text]


@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
def test_new_rows_change_nothing_where_no_token_has_more_candidates_than_it_may_keep(mode, saved, tmp_path):
    kind, rows = Kind(mode=mode, top_k=14), 40
    former = saved(kind)
    tables = {name: grown(name, table, rows) for name, table in former.rows.items()}
    # Of a token's 16 rows hardly ever more than 14 are positive, and there are texts without such a token.
    texts = [[{"input_ids": batch(seed, size=2, length=6), "use_cache": False}] for seed in range(8)]
    candidates = [defined(former, tables, rows, text)[1] for text in texts]
    most = [max(int((layer > 0).sum(1).max()) for layer in found.values()) for found in candidates]
    text, found = next((t, c) for t, c, count in zip(texts, candidates, most, strict=True) if count <= kind.top_k)
    # New keys are active, or it would be no wonder.
    assert all(bool(layer.view(-1, EXPERTS, 8)[:, :, 7:].any()) for layer in found.values())
    resized = grow(tiny_llama(), former.folder, tmp_path, rows, batches=text)
    assert resized.comparison.equal and resized.comparison.displaced_mass == 0
    assert resized.comparison.tokens == 12
    logits = logits_of(resized.folder, text)
    assert largest_change(logits, logits_of(former.folder, text)) <= 1e-6 * float(logits[0].abs().max())
    assert largest_change(logits, defined(former, tables, kind.top_k, text)[0]) < 1e-4


def test_dropping_rows_that_no_token_picks_changes_nothing(saved, tmp_path):
    former, rows = saved(Kind()), 30
    _, activations = defined(former, former.rows, 3, SHORT_TEXT)
    kept = expected_kept(former, Kind(), rows, SHORT_TEXT)
    for name, found in activations.items():
        dropped = sorted(set(range(ROWS)) - set(kept[name]))
        assert len(dropped) == 5 and not found[:, dropped].any() and found.any()
    resized = prune(tiny_llama(), former.folder, tmp_path, rows, batches=SHORT_TEXT)
    assert resized.comparison.equal and resized.comparison.displaced_mass == 0
    found = logits_of(resized.folder, SHORT_TEXT)
    assert largest_change(found, logits_of(former.folder, SHORT_TEXT)) <= 1e-6 * float(found[0].abs().max())


@pytest.mark.parametrize("how", ["grow", "prune"])
@each_kind
def test_the_report_says_what_the_definition_says(how, kind, saved, tmp_path):
    former = saved(kind)
    if how == "grow":
        rows = 50
        resized = grow(tiny_llama(), former.folder, tmp_path, rows, batches=TEXT)
        tables = {name: grown(name, table, rows) for name, table in former.rows.items()}
        if kind.bf16:
            tables = {name: planes.rounded(table) for name, table in tables.items()}
        place = {f"model.layers.{i}.mlp": [10 * (row // 7) + row % 7 for row in range(ROWS)] for i in range(LAYERS)}
    else:
        rows = 20
        resized = prune(tiny_llama(), former.folder, tmp_path, rows, batches=TEXT)
        kept = expected_kept(former, kind, rows, TEXT)
        tables = {name: table[kept[name.rsplit("/", 1)[0]]] for name, table in former.rows.items()}
        place = {name: [own.index(row) if row in own else -1 for row in range(ROWS)] for name, own in kept.items()}
    first, before = defined(former, former.rows, 3, TEXT)
    second, after = defined(former, tables, 3, TEXT)
    total, displaced = 0.0, 0.0
    for name, found in before.items():
        for token, row in found.nonzero().tolist():
            total += float(found[token, row])
            now = place[name][row]
            if now < 0 or not after[name][token, now]:
                displaced += float(found[token, row])
    comparison = resized.comparison
    assert comparison.displaced_mass == pytest.approx(displaced / total, abs=1e-5) and displaced > 0
    changes = torch.cat([(a - b).abs().flatten() for a, b in zip(first, second, strict=True)])
    assert comparison.mean_change == pytest.approx(float(changes.mean()), rel=1e-3)
    assert comparison.max_change == pytest.approx(float(changes.max()), rel=1e-3)
    assert not comparison.equal and not comparison.bit_equal


def test_padding_does_not_count(saved, tmp_path):
    """Neither for what is displaced nor for what changes."""
    ids = TEXT[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    texts = [TEXT[:1], [{"input_ids": padded, "attention_mask": mask, "use_cache": False}]]
    plain, other = (
        prune(tiny_llama(), saved(Kind()).folder, tmp_path / str(i), 20, batches=text) for i, text in enumerate(texts)
    )
    assert plain.comparison.tokens == other.comparison.tokens == 18
    assert plain.comparison.displaced_mass == pytest.approx(other.comparison.displaced_mass, rel=1e-5)
    assert plain.comparison.mean_change == pytest.approx(other.comparison.mean_change, rel=1e-3)
    assert plain.comparison.max_change == pytest.approx(other.comparison.max_change, rel=1e-3)


# How training goes on


@pytest.mark.parametrize("how", ["grow", "prune"])
@each_kind
def test_training_goes_on(how, kind, saved, tmp_path):
    former, rows = saved(kind), {"grow": 50, "prune": 20}[how]
    if how == "grow":
        grow(tiny_llama(), former.folder, tmp_path, rows)
        kept = {name: [10 * (row // 7) + row % 7 for row in range(ROWS)] for name in former.rows}
    else:
        prune(tiny_llama(), former.folder, tmp_path, rows, batches=SHORT_TEXT)
        of_ffn = expected_kept(former, kind, rows, SHORT_TEXT)
        kept = {name: of_ffn[name.rsplit("/", 1)[0]] for name in former.rows}
    engine = kind.engine(rows)
    engine.load_checkpoint(str(tmp_path))
    assert engine.global_steps == STEPS
    state = full_state(engine)
    assert state.keys() == former.state.keys()
    for name, tensor in state.items():
        table = next((table for table in kept if name == table or name.startswith(f"{table}/")), None)
        old = former.state[name]
        if table is not None:
            tensor, old = (tensor[kept[table]], old) if how == "grow" else (tensor, old[kept[table]])
        assert torch.equal(tensor, old), name
    losses = [train_step(engine, [batch(9)]) for _ in range(4)]
    assert losses[-1] < losses[0]
    moved = row_state(engine)
    if how == "grow":
        new = torch.ones(rows, dtype=torch.bool)
        for table, own in kept.items():
            fresh = new.index_fill(0, torch.tensor(own), False)
            learned = moved[f"{table}/exp_avg"][fresh].any(1)
            assert learned.any(), f"no new row of {table} has learned"
            assert (moved[f"{table}/step"][fresh][learned] > state[f"{table}/step"][fresh][learned]).all()
            assert not torch.equal(moved[table][fresh][learned], state[table][fresh][learned])


def test_growing_twice_and_back(saved, tmp_path):
    """Rows that a first step back drops were never used: what is left is the former checkpoint, bit for bit."""
    former = saved(Kind(top_k=14))
    one = grow(tiny_llama(), former.folder, tmp_path / "one", 40)
    two = grow(tiny_llama(), one.folder.parent, tmp_path / "two", 50)
    keys = raw(two.folder / "meft")["model.layers.1.mlp/keys", "compute"]
    assert len(keys.unique(dim=0)) == 50
    text = [{"input_ids": torch.arange(3, VOCAB).view(2, -1), "use_cache": False}]
    back = prune(tiny_llama(), two.folder.parent, tmp_path / "back", ROWS, batches=text)
    before, after = raw(former.files), raw(back.folder / "meft")
    lost = [key for key in before if not torch.equal(before[key], after[key])]
    assert lost == []


# Files of several ranks


@dataclass
class Part:
    """The rows of one rank, out of files of all of them."""

    tensors: dict[tuple[str, str], Tensor]
    owned: slice

    def blocks(self) -> Iterable[Block]:
        for name in sorted({table for table, _ in self.tensors}):
            for rows in [self.owned] if self.owned.start < self.owned.stop else []:
                yield Block(Named(name), rows)

    def kinds(self, table: Any) -> dict[str, Tensor]:
        return {kind: tensor for (name, kind), tensor in self.tensors.items() if name == table.name}

    def take(self, block: Block) -> dict[str, Tensor]:
        return {kind: tensor[block.rows] for kind, tensor in self.kinds(block.table).items()}


@dataclass(frozen=True)
class Named:
    name: str


def write_manifest(tag: Path, **layout: Any) -> None:
    """As if the files that are there had been saved so."""
    manifest = folders.read_manifest(tag)
    present = {path.relative_to(tag).as_posix(): path for path in tag.rglob("*") if path.is_file()}
    manifest.files = {name: folders.digest(path) for name, path in present.items() if name != folders.MANIFEST}
    manifest.layout |= layout
    manifest.write(tag)


def as_saved_by(ranks: list[slice], saved: Saved, folder: Path) -> Path:
    """The same checkpoint, as ranks with these rows would have written it."""
    shutil.copytree(saved.folder, folder)
    files = folders.find(folder, None) / "meft"
    tensors = raw(files)
    (files / "rows-0-of-1.safetensors").unlink()
    for rank, owned in enumerate(ranks):
        name = shards.file_name(rank, len(ranks))
        shards.write_rows(Part(tensors, owned), {"torch": torch.full((3,), rank)}, files / name)
    write_manifest(files.parent, ranks=len(ranks))
    return folder


@pytest.mark.parametrize(
    ("ends", "grown_ends"),
    [([14, 35], [20, 50]), ([0, 7, 14, 14, 21, 28, 35], [0, 10, 20, 20, 30, 40, 50])],
    ids=["two ranks", "more ranks than experts"],
)
@pytest.mark.parametrize("how", ["grow", "prune"])
def test_each_rank_keeps_its_file(how, ends, grown_ends, saved, tmp_path):
    former = saved(Kind(bf16=True))
    ranks = [slice(*span) for span in zip([0, *ends], ends, strict=False)]
    folder = as_saved_by(ranks, former, tmp_path / "ranks")
    if how == "grow":
        resized = grow(tiny_llama(), folder, tmp_path / "new", 50)
        alone = grow(tiny_llama(), former.folder, tmp_path / "alone", 50)
        new_ends = grown_ends
    else:
        resized = prune(tiny_llama(), folder, tmp_path / "new", 20, batches=TEXT)
        alone = prune(tiny_llama(), former.folder, tmp_path / "alone", 20, batches=TEXT)
        new_ends = [end * 4 // 7 for end in ends]
    assert folders.read_manifest(resized.folder).layout["ranks"] == len(ends)
    for rank, span in enumerate(zip([0, *new_ends], new_ends, strict=False)):
        file = load_file(resized.folder / "meft" / shards.file_name(rank, len(ends)))
        assert file.pop("random_state/torch").tolist() == [rank] * 3
        spans = {name.rsplit("/", 1)[1] for name in file}
        assert spans == ({f"{span[0]}-{span[1]}"} if span[0] < span[1] else set())
    one, other = raw(resized.folder / "meft"), raw(alone.folder / "meft")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("how", ["grow", "prune"])
def test_rows_pass_a_few_at_a_time(how, saved, tmp_path, monkeypatch):
    former, taken, read = saved(Kind(bf16=True)), [], []
    change = grow if how == "grow" else functools.partial(prune, batches=SHORT_TEXT)
    rows = 50 if how == "grow" else 20
    whole = change(tiny_llama(), former.folder, tmp_path / "whole", rows)
    monkeypatch.setattr(resized_rows, "pieces", functools.partial(pieces, limit=3 * 32 * 4))
    take, read_rows = resized_rows.ResizedRows.take, shards.RowShards.read

    def take_noting(self: Any, block: Block) -> dict[str, Tensor]:
        taken.append(block.rows.stop - block.rows.start)
        return take(self, block)

    def read_noting(self: Any, table: str, kind: str, part: slice) -> Tensor:
        if kind == "exp_avg":
            read.append(part.stop - part.start)
        return read_rows(self, table, kind, part)

    monkeypatch.setattr(resized_rows.ResizedRows, "take", take_noting)
    monkeypatch.setattr(shards.RowShards, "read", read_noting)
    resized = change(tiny_llama(), former.folder, tmp_path / "pieces", rows)
    assert max(taken) <= 3 and max(read) <= 3 and len(taken) > 2 * LAYERS
    one, other = raw(resized.folder / "meft"), raw(whole.folder / "meft")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Where it goes


def test_another_tag_in_the_same_folder(saved, tmp_path):
    former = saved(Kind())
    shutil.copytree(former.folder, tmp_path / "copy")
    resized = grow(tiny_llama(), tmp_path / "copy", tmp_path / "copy", 50, save_tag="wider")
    assert resized.folder == tmp_path / "copy" / "wider"
    assert folders.find(tmp_path / "copy", None) == resized.folder
    again = grow(tiny_llama(), tmp_path / "copy", tmp_path / "copy", 40, tag=f"global_step{STEPS}", save_tag="other")
    assert again.former_rows == ROWS
    assert len(folders.whole_ones(tmp_path / "copy")) == 3
    assert not list((tmp_path / "copy").glob(f"*{folders.PARTIAL}"))


# What is refused


def refuse(change: Callable[..., Any], former: Path, new: Path, rows: int, *words: str, **settings: Any) -> None:
    """In one sentence, with nothing written and nothing attached."""
    model, kind = settings.pop("model", None) or tiny_llama(), settings.pop("kind", ValueError)
    before = sorted(new.rglob("*")) if new.exists() else None
    with pytest.raises(kind) as raised:
        change(model, former, new, rows, **settings)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert (sorted(new.rglob("*")) if new.exists() else None) == before
    assert nothing_attached(model)


@pytest.mark.parametrize(
    ("how", "rows", "words"),
    [
        ("grow", 52, ["rows = 52", "num_experts = 5", "from 40 on"]),
        ("grow", 35, ["rows = 35", "not more than the 35", "from 40 on"]),
        ("grow", 20, ["rows = 20", "not more than the 35"]),
        ("grow", 0, ["rows = 0", "from 40 on"]),
        ("grow", 5 * 2**30, ["5368709120"]),
        ("prune", 18, ["rows = 18", "num_experts = 5", "from 10 to 30"]),
        ("prune", 35, ["rows = 35", "not fewer than the 35", "from 10 to 30"]),
        ("prune", 50, ["rows = 50", "not fewer than the 35"]),
        ("prune", 5, ["rows = 5", "top_k = 3", "from 10 to 30"]),
        ("prune", 0, ["rows = 0", "top_k = 3"]),
        ("prune", -5, ["rows = -5", "top_k = 3"]),
    ],
)
def test_numbers_of_rows_that_cannot_be(how, rows, words, saved, tmp_path):
    settings = {"batches": TEXT} if how == "prune" else {}
    change = grow if how == "grow" else prune
    refuse(change, saved(Kind()).folder, tmp_path / "new", rows, *words, kind=MeftConfigError, **settings)


def test_rows_that_top_k_needs(saved, tmp_path):
    words = ["rows = 30", "top_k = 14", "needs the 35"]
    refuse(prune, saved(Kind(top_k=14)).folder, tmp_path / "new", 30, *words, kind=MeftConfigError, batches=TEXT)


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
@pytest.mark.parametrize(
    "file",
    [
        "meft/rows-0-of-1.safetensors",
        "meft/shared.safetensors",
        "meft/adapter_config.json",
        "meft/manifest.json",
        "mp_rank_00_model_states.pt",
    ],
)
def test_a_torn_checkpoint(file, place, saved, tmp_path):
    shutil.copytree(saved(Kind()).folder, tmp_path / "copy")
    path = tmp_path / "copy" / f"global_step{STEPS}" / file
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    refuse(grow, tmp_path / "copy", tmp_path / "new", 50, str(tmp_path / "copy"))
    path.unlink()
    words = [file, "no whole checkpoint" if "manifest" in file else "is missing"]
    refuse(grow, tmp_path / "copy", tmp_path / "new", 50, *words, kind=FileNotFoundError)


def test_other_checkpoints_that_do_not_fit(saved, tmp_path):
    former = saved(Kind())
    refuse(grow, former.folder, tmp_path / "new", 50, "another base model", model=tiny_llama(seed=1))
    refuse(grow, former.folder, tmp_path / "new", 50, "model.layers", model=tiny_llama(num_hidden_layers=2))
    refuse(prune, former.folder, tmp_path / "new", 20, "without a text", batches=[])
    refuse(grow, former.folder, tmp_path / "new", 50, "cannot name a checkpoint", save_tag="../up")
    refuse(grow, former.folder, former.folder, 50, "exists already", "another folder or tag")
    refuse(grow, tmp_path / "absent", tmp_path / "new", 50, "latest is missing", kind=FileNotFoundError)
    refuse(grow, former.folder, tmp_path / "new", 50, "is missing", "global_step3", tag="no", kind=FileNotFoundError)
    meft_engine.load_adapter(taken := tiny_llama(), former.folder)
    with pytest.raises(MeftConfigError, match="already has an adapter named"):
        grow(taken, former.folder, tmp_path / "new", 50)
    assert not (tmp_path / "new").exists()


def test_rows_without_their_state(saved, tmp_path):
    """A checkpoint that says it is whole and is not."""
    former = saved(Kind(bf16=True))
    owned = [slice(0, 14), slice(14, ROWS)]
    folder = as_saved_by(owned, former, tmp_path / "ranks")
    files = folders.find(folder, None) / "meft"
    write_manifest(files.parent, ranks=3)
    refuse(grow, folder, tmp_path / "new", 50, "files of 2 ranks", "saved by 3")
    tensors = raw(files)
    for missing in ("exp_avg", "low", "step"):
        for rank, rows in enumerate(owned):
            path = files / shards.file_name(rank, 2)
            path.unlink()
            fewer = {key: tensor for key, tensor in tensors.items() if key[1] != missing}
            shards.write_rows(Part(fewer, rows), {}, path)
        write_manifest(files.parent, ranks=2)
        refuse(grow, folder, tmp_path / "new", 50, f"keys/{missing} is missing")
    part = Part(tensors, slice(0, 7))
    (files / shards.file_name(0, 2)).unlink()
    shards.write_rows(part, {}, files / shards.file_name(0, 2))
    write_manifest(files.parent, ranks=2)
    refuse(grow, folder, tmp_path / "new", 50, "row 7 is due")


# What ends it halfway


def test_a_full_disk_leaves_what_was_there(saved, tmp_path, monkeypatch):
    former = saved(Kind())
    grow(tiny_llama(), former.folder, tmp_path, 50)
    write, pieces_left = SafetensorsStream.write, iter(range(10))

    def fail(self: Any, piece: Tensor) -> None:
        if next(pieces_left, None) is None:
            raise OSError(28, "No space left on device")
        write(self, piece)

    monkeypatch.setattr(SafetensorsStream, "write", fail)
    with pytest.raises(CheckpointSaveError, match=r"other could not be written \(.*No space left.*untouched"):
        grow(model := tiny_llama(), former.folder, tmp_path, 40, save_tag="other")
    assert nothing_attached(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"global_step{STEPS}", "latest"]
    assert (tmp_path / "latest").read_text() == f"global_step{STEPS}"


KILLED = """
import logging, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from meft_engine.checkpoint import resize
from meft_engine.checkpoint.tensor_files import SafetensorsStream
from tests.families import tiny_llama

def die(): os.kill(os.getpid(), signal.SIGKILL)

class AtPhase(logging.Handler):
    def emit(self, record):
        if record.getMessage().endswith(": " + phase): die()

logger = logging.getLogger("meft_engine")
logger.setLevel(logging.DEBUG)
logger.addHandler(AtPhase())
write = SafetensorsStream.write
written = 0

def write_some(stream, piece):
    global written
    written += 1
    if phase == "some rows" and written == 20: die()
    write(stream, piece)

SafetensorsStream.write = write_some
former, new, *phases = sys.argv[1:]
for phase in phases:
    child = os.fork()
    if not child:
        resize.grow(tiny_llama(), Path(former), Path(new) / phase, 50)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_a_kill_leaves_nothing_that_could_be_taken_for_a_checkpoint(saved, tmp_path):
    former, phases = saved(Kind()), ["begin", "rows", "some rows", "copies", "manifest", "place", "latest"]
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "latest").write_text("nothing")
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(former.folder), str(tmp_path), *phases],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert found.stdout.split() == [str(int(signal.SIGKILL))] * len(phases), found.stderr
    for phase in phases:
        there = [folder.name for folder in folders.whole_ones(tmp_path / phase) if folder.suffix != folders.PARTIAL]
        assert there == ([f"global_step{STEPS}"] if phase == "latest" else [])
        with pytest.raises(FileNotFoundError):
            folders.find(tmp_path / phase, None)
        if phase == "latest":
            folders.remove(tmp_path / phase / f"global_step{STEPS}")
        resized = grow(tiny_llama(), former.folder, tmp_path / phase, 50)
        assert folders.find(tmp_path / phase, None) == resized.folder
        assert not list((tmp_path / phase).rglob(f"*{folders.PARTIAL}"))


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The tiny model with a tokenizer of its own, as files."""
    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


def arguments(how: str, base: Path, saved: Saved, output: Path, rows: int, *more: str) -> list[str]:
    place = ["--model", str(base), "--checkpoint", str(saved.folder), "--output", str(output), "--dtype", "fp32"]
    return [how, *place, "--rows", str(rows), *more]


@pytest.mark.parametrize(("how", "rows"), [("grow", 50), ("prune", 20)])
def test_the_command(how, rows, base, saved, tmp_path, capsys):
    former = saved(Kind())
    text = tmp_path / "text.txt"
    ids = torch.cat([inputs["input_ids"].flatten() for inputs in TEXT])[:23].tolist()
    text.write_text(" ".join(f"w{i}" for i in ids))
    command.main(arguments(how, base, former, tmp_path / "new", rows, "--text", str(text), "--max_length", "9"))
    *_, advice, last = capsys.readouterr().out.strip().splitlines()
    assert f'"rows": {rows}' in advice and '"num_experts": 5' in advice
    result = json.loads(last)
    batches = [torch.tensor(ids[:18]).view(2, 9), torch.tensor([ids[18:]])]
    inputs = [{"input_ids": found, "use_cache": False} for found in batches]
    change = grow if how == "grow" else prune
    expected = change(tiny_llama(), former.folder, tmp_path / "expected", rows, batches=inputs)
    assert result.pop("folder") == str(tmp_path / "new" / f"global_step{STEPS}")
    assert result == {"former_rows": ROWS, "rows": rows, "num_experts": EXPERTS, **vars(expected.comparison)}
    one, other = raw(tmp_path / "new" / f"global_step{STEPS}" / "meft"), raw(expected.folder / "meft")
    assert all(torch.equal(one[key], other[key]) for key in one)
    engine = Kind().engine(rows)
    engine.load_checkpoint(str(tmp_path / "new"))
    assert differing(row_state(engine), {}) != []


def test_the_command_refuses_in_one_sentence(base, saved, tmp_path, capsys):
    former, empty = saved(Kind()), tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(SystemExit, match=r"^resize.py: rows = 36 is not .*multiple of adapter.num_experts = 5"):
        command.main(arguments("grow", base, former, tmp_path / "new", 36))
    shutil.copytree(former.folder, tmp_path / "trainer" / "checkpoint-3")
    (tmp_path / "trainer" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"no whole checkpoint in \S+trainer; there is one in \S+checkpoint-3$"):
        command.main(arguments("grow", base, replace(former, folder=tmp_path / "trainer"), tmp_path / "new", 50))
    with pytest.raises(SystemExit, match=r"empty.txt is empty; give a file"):
        command.main(arguments("prune", base, former, tmp_path / "new", 20, "--text", str(empty)))
    with pytest.raises(SystemExit, match=r"absent.txt"):
        command.main(arguments("prune", base, former, tmp_path / "new", 20, "--text", str(tmp_path / "absent.txt")))
    with pytest.raises(SystemExit):
        command.main(arguments("prune", base, former, tmp_path / "new", 20))
    assert "prune needs --text" in capsys.readouterr().err
    command.main(arguments("grow", base, former, tmp_path / "new", 50))
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == {
        "folder": str(tmp_path / "new" / f"global_step{STEPS}"),
        "former_rows": ROWS,
        "rows": 50,
        "num_experts": EXPERTS,
    }
