"""What sweeps of tests train: a tiny Llama with a tokenizer, questions, a DeepSpeed JSON and the YAML of a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import tiny_block, tiny_llama

DS_CONFIG = {
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "zero_optimization": {"stage": 0},
    "meft": tiny_block(),
}
ARGUMENTS = {
    **{"max_length": 24, "max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
    **{"logging_steps": 1, "save_steps": 2, "report_to": "none"},
}


def steps_logged(log: Path) -> int:
    """How many steps a log tells of, in the words of the Trainer or of our own lines, with ``logging_steps`` of 1.

    What several ranks print at a time may be torn, in the middle of a letter too: it is read as bytes.
    """
    return len(re.findall(rb"'loss':|\bstep \d+/\d+ \(", log.read_bytes())) if log.is_file() else 0


def write_model(folder: Path) -> None:
    """A tiny Llama, and a tokenizer that knows single characters."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(33, 123))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    tiny_llama().save_pretrained(folder)


def write_materials(folder: Path) -> None:
    """``model``, ``train.jsonl`` and ``ds.json``."""
    write_model(folder / "model")
    lines = [json.dumps({"prompt": f"city {i} is", "completion": f" {chr(97 + i % 26) * 3}"}) for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "ds.json").write_text(json.dumps(DS_CONFIG))


def content(folder: Path, arguments: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A sweep's file over :func:`write_materials`, on the CPU; ``arguments`` and ``sections`` override."""
    data = {"model_name_or_path": str(folder / "model"), "train_file": str(folder / "train.jsonl")}
    base = {"config": str(folder / "ds.json"), "arguments": {**data, **ARGUMENTS, **(arguments or {})}}
    return {"base": base, "resources": {"gpus": 0}, **sections}


def write_sweep(path: Path, values: dict[str, Any]) -> Path:
    """The YAML."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
