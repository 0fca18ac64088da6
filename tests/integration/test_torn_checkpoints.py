"""A checkpoint that something has happened to is refused in one sentence, and nothing in memory has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meft_engine import MeftConfigError, load_adapter
from meft_engine.checkpoint import export, folders
from meft_engine.checkpoint.saver import CheckpointSaveError
from meft_engine.checkpoint.tensor_files import write_tensors
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, full_state, refuse, train_step

TAG = "global_step2"
FILES = [
    "meft/adapter_config.json",
    "meft/rows-0-of-1.safetensors",
    "meft/shared.safetensors",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    engine = build_engine(tiny_llama(), stage=2)
    for step in range(2):
        train_step(engine, [batch(step)])
        engine.save_checkpoint(str(folder))
    return folder


@pytest.fixture(scope="module")
def engine() -> Any:
    """In another state; a refused load changes nothing, so that one will do."""
    made = build_engine(tiny_llama(), stage=2)
    train_step(made, [batch(5)])
    return made


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flip(path: Path, place: float) -> None:
    """Change one bit, at a place between the first (0) and the last byte (1)."""
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_in_any_file(file, place, engine, copied):
    flip(copied / TAG / file, place)
    # A description that is no JSON any more is refused before its sum is looked at.
    refuse(engine, copied, MeftConfigError, str(copied / TAG / file))
    if file.startswith("meft"):
        with pytest.raises(MeftConfigError, match=Path(file).name):
            load_adapter(tiny_llama(), copied)


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file(file, engine, copied):
    path = copied / TAG / file
    path.write_bytes(path.read_bytes()[:-1])
    refuse(engine, copied, MeftConfigError, str(path))
    path.write_bytes(b"")
    refuse(engine, copied, MeftConfigError, str(path))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / folders.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_truncated_manifest(engine, copied):
    path = copied / TAG / folders.MANIFEST
    for count in (0, 1, len(path.read_text()) // 2, len(path.read_text()) - 2):
        path.write_text(path.read_text()[:count])
        refuse(engine, copied, MeftConfigError, str(path), "cannot be read", "no whole checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("files"),
        lambda content: content.update(files=[]),
        lambda content: content.update(files={"latest": 3}),
        lambda content: content["files"]["meft/shared.safetensors"].pop("sha256"),
        lambda content: content.update(global_steps="many"),
    ],
)
def test_a_manifest_of_another_shape(change, engine, copied):
    edit(copied / TAG, change)
    refuse(engine, copied, MeftConfigError, "manifest.json", "cannot be read")


def test_a_manifest_that_lacks_a_file_is_no_cover_for_it(engine, copied):
    edit(copied / TAG, lambda content: content["files"].pop("meft/shared.safetensors"))
    refuse(engine, copied, MeftConfigError, "shared.safetensors", "not in the list")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "meft/../../outside", "..", "", "meft\\x"])
def test_a_manifest_that_points_outside_its_folder(name, engine, copied):
    (copied / "outside").write_text("secret")
    edit(copied / TAG, lambda content: content["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    refuse(engine, copied, MeftConfigError, repr(name), "outside the checkpoint")


def test_a_symbolic_link(engine, copied, tmp_path):
    path = copied / TAG / "meft" / "shared.safetensors"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refuse(engine, copied, MeftConfigError, str(path), "symbolic link")


def test_a_folder_that_is_a_symbolic_link(engine, copied, tmp_path):
    path = copied / TAG / "meft"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refuse(engine, copied, MeftConfigError, "symbolic link")


@pytest.mark.parametrize("what", ["end beyond the file", "overlap", "length of the header"])
def test_a_header_that_lies_where_the_manifest_believes_it(what, engine, copied):
    path = copied / TAG / "meft" / "rows-0-of-1.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if "/compute/" in name]
    if what == "length of the header":
        content = (1 << 40).to_bytes(8, "little") + content[8:]
    else:
        first, second = header[names[0]]["data_offsets"], header[names[1]]["data_offsets"]
        header[names[0]]["data_offsets"] = second if what == "overlap" else [first[0], first[1] + (1 << 30)]
        encoded = json.dumps(header).encode()
        content = len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]
    path.write_bytes(content)
    found = folders.digest(path)
    record = {"bytes": found.bytes, "sha256": found.sha256}
    edit(copied / TAG, lambda manifest: manifest["files"].update({"meft/rows-0-of-1.safetensors": record}))
    refuse(engine, copied, MeftConfigError, str(path), "not a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: {"0-30": rows[:30]}, "has 30 rows, where 35"),
        (lambda rows: {"0-10": rows[:10], "12-35": rows[12:]}, "row 10 is due"),
        (lambda rows: {"0-35": rows[:30]}, "has 30 rows"),
        (lambda rows: {"0-35": rows.double()}, "type F64"),
        (lambda rows: {}, "is missing"),
    ],
)
@pytest.mark.parametrize("kind", ["compute", "exp_avg"])
def test_rows_that_are_not_all_there(kind, change, words, engine, copied):
    """In a file that the manifest believes."""
    path, name = copied / TAG / "meft" / "rows-0-of-1.safetensors", f"model.layers.1.mlp/values/{kind}"
    tensors = load_file(path)
    tensors |= {f"{name}/{rows}": part for rows, part in change(tensors.pop(f"{name}/0-35")).items()}
    path.unlink()
    found = write_tensors(path, tensors)
    record = {"bytes": found.bytes, "sha256": found.sha256}
    edit(copied / TAG, lambda manifest: manifest["files"].update({"meft/rows-0-of-1.safetensors": record}))
    refuse(engine, copied, MeftConfigError, name, words)


@pytest.mark.parametrize("content", ["", "global_step7", "..", "/", "../copy/global_step2", "a\nb"])
def test_a_torn_latest_names_the_newest_whole_checkpoint(content, engine, copied):
    (copied / "latest").write_text(content)
    refuse(engine, copied, FileNotFoundError, str(copied / "latest"), f"tag='{TAG}'")
    (copied / "latest").unlink()
    refuse(engine, copied, FileNotFoundError, str(copied / "latest"), "is missing", f"tag='{TAG}'")
    (copied / TAG / "meft" / "shared.safetensors").unlink()
    refuse(engine, copied, FileNotFoundError, "is missing", "tag='global_step1'")
    shutil.rmtree(copied / "global_step1")
    refuse(engine, copied, FileNotFoundError, "there is no whole checkpoint")


def test_a_save_that_did_not_end_is_never_taken(engine, copied):
    """Its folder has another name, and no manifest; the next save of that name removes it."""
    shutil.copytree(copied / TAG, copied / "global_step3.partial")
    (copied / "global_step3.partial" / folders.MANIFEST).unlink()
    assert folders.find(copied, None).name == TAG
    assert [folder.name for folder in folders.whole_ones(copied)] == ["global_step1", TAG]
    refuse(engine, copied, FileNotFoundError, "manifest.json is missing", tag="global_step3.partial")


@pytest.mark.parametrize("tag", ["a/b", "..", "", "x.partial", "x.old"])
def test_a_tag_that_names_no_folder_there(tag, engine, tmp_path):
    with pytest.raises(ValueError, match="cannot name a checkpoint"):
        engine.save_checkpoint(str(tmp_path / "new"), tag=tag)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_leaves_what_was_there(background, tmp_path, monkeypatch):
    from meft_engine.checkpoint import shards

    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"async_save": background}), stage=2)
    train_step(engine, [batch(1)])
    engine.save_checkpoint(str(tmp_path))
    train_step(engine, [batch(2)])

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_rows", fail)
        if background:
            engine.save_checkpoint(str(tmp_path))
            engine._saver._thread.join()
            with pytest.raises(CheckpointSaveError, match="No space left.*untouched.*in the background"):
                train_step(engine, [batch(3)])
        else:
            with pytest.raises(CheckpointSaveError, match="No space left.*untouched"):
                engine.save_checkpoint(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["global_step1"]
    assert folders.find(tmp_path, None).name == "global_step1"
    # Said once; training and saving go on.
    train_step(engine, [batch(3)])
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    assert folders.find(tmp_path, None).name.startswith("global_step")
    assert len(folders.whole_ones(tmp_path)) == 2


def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"keep_last": 2}))
    seen = []
    original = folders.prune
    monkeypatch.setattr(
        folders,
        "prune",
        lambda *arguments: seen.append([f.name for f in folders.whole_ones(tmp_path)]) or original(*arguments),
    )
    for step in range(4):
        train_step(engine, [batch(step)])
        engine.save_checkpoint(str(tmp_path))
    assert seen[-1] == ["global_step2", "global_step3", "global_step4"]
    assert [folder.name for folder in folders.whole_ones(tmp_path)] == ["global_step3", "global_step4"]
    assert (tmp_path / "latest").read_text() == "global_step4"


def test_a_rename_that_fails_gives_the_old_checkpoint_its_name_back(tmp_path, monkeypatch):
    """Where two folders cannot be exchanged."""
    engine = build_engine(tiny_llama(), stage=2)
    train_step(engine, [batch(0)])
    engine.save_checkpoint(str(tmp_path), tag="best")
    saved, rename = full_state(engine), os.rename
    train_step(engine, [batch(1)])

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(folders.PARTIAL):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(folders, "_exchange", lambda one, other: False)
        patched.setattr(os, "rename", fail)
        with pytest.raises(CheckpointSaveError, match="Input/output error.*untouched"):
            engine.save_checkpoint(str(tmp_path), tag="best")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["best"]
    engine.load_checkpoint(str(tmp_path))
    assert differing(full_state(engine), saved) == []


def test_what_only_pickle_can_read_is_said(tmp_path, caplog):
    engine = build_engine(tiny_llama(), stage=2)
    for value, warned in ({"plain": [1, 2.0, "three"]}, False), ({"path": tmp_path}, True):
        engine.save_checkpoint(str(tmp_path), tag="t", client_state=value)
        caplog.clear()
        with caplog.at_level("WARNING", logger="meft_engine"):
            _, client = build_engine(tiny_llama(), stage=2).load_checkpoint(str(tmp_path))
        assert client.items() >= value.items()
        assert ("only pickle can read" in caplog.text) == warned


def test_an_export_that_ends_halfway_is_absent(tmp_path, monkeypatch):
    """Over an adapter that was there: rather none than the weights of one with the configuration of the other."""
    engine = build_engine(tiny_llama())
    engine.save_adapter(tmp_path)
    train_step(engine, [batch(0)])
    with monkeypatch.context() as patched:
        patched.setattr(export.folders, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        (tmp_path / "README.md").unlink()
        with pytest.raises(KeyboardInterrupt):
            engine.save_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_llama(), tmp_path)
    engine.save_adapter(tmp_path)
    load_adapter(tiny_llama(), tmp_path)


def test_rounded_rows_are_not_exported_as_fp32(tmp_path):
    engine = build_engine(tiny_llama(), stage=2, bf16=True)
    engine.save_adapter(tmp_path / "one rank", dtype="fp32")
    for table in engine.meft_adapters.tables():
        table.shard = SimpleNamespace(shares_state=False)
    with pytest.raises(ValueError, match="leave dtype out"):
        export.save_adapter(engine.meft_adapters, tmp_path / "several", dtype=torch.float32)
    for table in engine.meft_adapters.tables():
        table.shard = None
    assert not (tmp_path / "several").exists()


def test_saving_the_same_tag_again_replaces_it_whole(tmp_path, monkeypatch):
    """With and without a system that can exchange two folders."""
    engine = build_engine(tiny_llama(), stage=2)
    for exchanging in (True, False):
        if not exchanging:
            monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
        for step in range(2):
            train_step(engine, [batch(step)])
            engine.save_checkpoint(str(tmp_path), tag="best")
            assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["best"]
            other = build_engine(tiny_llama(), stage=2)
            other.load_checkpoint(str(tmp_path))
            assert differing(full_state(engine), full_state(other)) == []
