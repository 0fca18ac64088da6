"""The adapter alone, to travel, in files as PEFT names them: a configuration, the weights, a model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.checkpoint import adapter_files, folders
from meft_engine.checkpoint.saved_adapter import CONFIG_FILE, INDEX_FILE, PEFT_TYPE, WEIGHTS_FILE
from meft_engine.checkpoint.tensor_files import Described, SafetensorsStream, WrittenFile
from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.phases import phase
from meft_kernels import planes

_STEM = WEIGHTS_FILE.partition(".")[0]
MAX_FILE_BYTES = 5 * 10**9
"""As PEFT and transformers split files; a table is never split."""


@phase("save")
def save_adapter(
    attached: AttachedAdapters,
    folder: Path,
    *,
    write: bool = True,
    read: Callable[[PartiallyOffloadedTensor, slice], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    figures: Mapping[str, object] | None = None,
) -> None:
    """Write the adapter to ``folder``, in files of at most 5 GB and with hardly any memory.

    Tensors: ``<ffn>.keys`` and ``<ffn>.values`` [r, d], and what :func:`adapter_files.small_tensors` gives.

    Args:
        write: ``False`` where another rank writes: under ZeRO stage 3 all ranks bring the routers together.
        read: gives the masters [n, d] float32 of some rows of a table, where what is stored may not be up to date or
            not exact; ``None``: the compute copies are what there is.
        dtype: of the rows in the files, float32 or bfloat16; ``None``: that of the compute copies.
        state_dict: of the model, from which routers are taken if it has them.
        figures: of the training, for the model card.

    Raises:
        ValueError: if another kind of adapter is in that folder, or ``dtype`` asks for more than this rank has.
        OSError: if it cannot be written; an adapter that was there before still is.
    """
    small = adapter_files.small_tensors(attached, resumable=False, state_dict=state_dict)
    if not write:
        return
    dtype = dtype or attached.compute_dtype
    _require_own(folder)
    _require_exact(attached, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {table.name.replace("/", "."): table for table in attached.tables()}
    parts = _split(tables, dtype, sum(tensor.nbytes for tensor in small.values()))
    files: dict[str, WrittenFile] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        name = WEIGHTS_FILE
        if len(parts) > 1:
            name = WEIGHTS_FILE.replace(".", f"-{number + 1:05}-of-{len(parts):05}.")
        own = small if number == 0 else {}
        weight_map |= dict.fromkeys([*own, *names], name)
        partial = folder / (name + folders.PARTIAL)
        partial.unlink(missing_ok=True)
        try:
            files[name] = _write(partial, own, {key: tables[key] for key in names}, dtype, read)
        except BaseException:
            _remove(folder, f"*{folders.PARTIAL}")
            raise
    # Without its configuration there is no adapter here, rather than half of one.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _remove(folder, "*.safetensors", INDEX_FILE.removeprefix(_STEM))
    for name in files:
        (folder / (name + folders.PARTIAL)).replace(folder / name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(file.bytes for file in files.values())}, "weight_map": weight_map}
        files[INDEX_FILE] = folders.write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    card = folder / "README.md"
    if not card.exists():
        folders.write_text(card, model_card(attached, figures or {}))
    folders.write_text(folder / CONFIG_FILE, adapter_files.describe(attached, dtype, files))


def _split(tables: Mapping[str, PartiallyOffloadedTensor], dtype: torch.dtype, first: int) -> list[list[str]]:
    """Names of tables by the files that they go to, the first of which holds ``first`` bytes besides."""
    parts: list[list[str]] = [[]]
    used = first
    for name, table in tables.items():
        size = table.rows * table.width * dtype.itemsize
        if used + size > MAX_FILE_BYTES and used:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _write(
    path: Path,
    small: Mapping[str, Tensor],
    tables: Mapping[str, PartiallyOffloadedTensor],
    dtype: torch.dtype,
    read: Callable[[PartiallyOffloadedTensor, slice], Tensor] | None,
) -> WrittenFile:
    described = {name: Described(tuple(tensor.shape), tensor.dtype) for name, tensor in small.items()}
    described |= {name: Described(tuple(table.handle.shape), dtype) for name, table in tables.items()}
    # "format" is what transformers asks for.
    with SafetensorsStream(path, described, {"format": "pt"}) as stream:
        for tensor in small.values():
            stream.write(tensor)
        for table in tables.values():
            for rows in pieces(slice(0, table.rows), table.width * torch.float32.itemsize):
                found = read(table, rows) if read is not None else table.planes()[0][rows]
                # Rounded as compute copies are.
                stream.write(planes.split(found.float())[0] if dtype == torch.bfloat16 else found.float())
        return stream.finish()


def _remove(folder: Path, *endings: str) -> None:
    """Weights of an adapter that was here before, or of one that did not come to be."""
    for ending in endings:
        for path in folder.glob(_STEM + ending):
            path.unlink()


def _require_own(folder: Path) -> None:
    """Another kind of adapter has a file of the same name, which must not be lost."""
    path = folder / CONFIG_FILE
    kind = json.loads(path.read_text()).get("peft_type") if path.is_file() else PEFT_TYPE
    if kind != PEFT_TYPE:
        raise ValueError(
            f"{folder} holds an adapter of type {kind}, which would be overwritten; save to another folder"
        )


def _require_exact(attached: AttachedAdapters, dtype: torch.dtype) -> None:
    """Of rows that other ranks own, this one has no more than the compute copy."""
    for table in attached.tables():
        owners_alone = table.shard is not None and not table.shard.shares_state
        if owners_alone and dtype == torch.float32 and table.compute_dtype != dtype:
            raise ValueError(
                'save_adapter(dtype="fp32") with several ranks would give rounded rows, whose fp32 masters each owner '
                "alone has; leave dtype out, or load a checkpoint with one rank and save there"
            )


def model_card(attached: AttachedAdapters, figures: Mapping[str, object]) -> str:
    """A README with what is known of the adapter and its training."""
    shape = attached.config.adapter
    base = attached.peft_keys.get("base_model_name_or_path")
    name = base or "…"
    header = ["---", "library_name: meft_engine", "tags:", "- meft", "- adapter"]
    if base and not Path(base).is_absolute():
        header.insert(1, f"base_model: {base}")
    trained = sum(table.rows * table.width for table in attached.tables())
    lines = [
        *header,
        "---",
        "",
        f"# A MEFT adapter for {base or 'its base model'}",
        "",
        f"{len(attached.adapters)} FFNs with {shape.rows} rows each ({trained:,} parameters), of which a token uses at "
        f"most {shape.top_k} of {shape.experts_per_token} of {shape.resolved_num_experts} experts.",
        "",
        "```python",
        "import meft_engine",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        'meft_engine.load_adapter(model, "this folder")',
        "```",
    ]
    if figures:
        lines += [
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in figures.items()),
        ]
    return "\n".join(lines) + "\n"
