"""Loading a model with its adapter, and answering many prompts at once. Needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def native_bf16() -> bool:
    """Whether this machine computes in bf16 at speed; a CPU that has to emulate it is 50 times slower than in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may go
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the adapter, which may have a chat template of its own, else the model's."""
    saved = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if saved else model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str, adapter: str | None = None, dtype: str = "auto", rows: str = "host"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on the GPU, or on the CPU where there is none, and its tokenizer.

    Args:
        model: folder or hub name of the base model.
        adapter: folder that ``launch/finetune.py`` wrote; ``None`` gives the base model.
        dtype: ``"fp32"``, ``"bf16"``, or ``"auto"`` for bf16 where the hardware has it.
        rows: where the adapter's values are, ``"host"`` or ``"device"``.
    """
    if dtype == "auto":
        dtype = "bf16" if native_bf16() else "fp32"
    tokenizer = load_tokenizer(model, adapter)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if adapter is not None:
        import meft_engine

        meft_engine.load_adapter(loaded, adapter, rows=rows)
    return loaded, tokenizer


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 64,
    max_new_tokens: int = 16,
    description: str = "Answering",
    one_line: bool = True,
) -> list[str]:
    """The model's answer to each prompt, in the order of the prompts; an answer of one line ends at the end of it.

    Prompts are padded on the left, so that all answers of a batch start at the same position, and sorted by length, so
    that little is padded.
    """
    lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch"):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip().partition("\n")[0].strip() if one_line else text.strip()
    return answers
