"""Gives a checkpoint more or fewer rows, and says what that changes on a text.

    python launch/resize.py grow --model MODEL --checkpoint FOLDER --rows 16384 --output FOLDER [--text FILE]
    python launch/resize.py prune --model MODEL --checkpoint FOLDER --rows 4096 --output FOLDER --text FILE

The text is plain; ``prune`` drops the rows that contribute least to it. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from inference import DTYPES, load_model
from resuming import newest_whole
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meft_engine.checkpoint import resize
from meft_engine.checkpoint.saver import CheckpointSaveError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses to prune without a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["grow", "prune"])
    parser.add_argument("--model", required=True, help="folder or hub name of the base model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that checkpoints were saved in")
    parser.add_argument("--tag", help="of the checkpoint; without it the one that `latest` names")
    parser.add_argument("--rows", type=int, required=True, help="of each adapted FFN from now on")
    parser.add_argument("--output", type=Path, required=True, help="folder to save in, which may be the same")
    parser.add_argument("--output_tag", help="of the new checkpoint; without it that of the former one")
    parser.add_argument("--text", type=Path, help="plain text to measure on; prune needs one")
    parser.add_argument("--max_length", type=int, default=512, help="tokens that attend to each other")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is native")
    args = parser.parse_args(argv)
    if args.action == "prune" and args.text is None:
        parser.error("prune needs --text: it drops the rows that contribute least to it")
    return args


def inputs_of(
    text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int
) -> list[dict[str, Any]]:
    """A text as inputs of the model: blocks of ``max_length`` tokens, or as many as it takes; the rest by itself."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device=model.device)
    length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    whole = len(ids) // length * length
    batches = list(ids[:whole].view(-1, length).split(batch_size)) if whole else []
    if whole < len(ids):
        batches.append(ids[None, whole:])
    return [{"input_ids": batch, "use_cache": False} for batch in batches]


def result_of(resized: resize.Resized) -> dict[str, Any]:
    """What the last line says."""
    values = {**asdict(resized), "folder": str(resized.folder)}
    comparison = values.pop("comparison")
    return values | (comparison or {})


def show(resized: resize.Resized) -> Table:
    """The result for people."""
    table = Table(title=str(resized.folder), show_header=False)
    table.add_row("rows of each FFN", f"{resized.former_rows} before → {resized.rows} after")
    found = resized.comparison
    if found is not None:
        equal = "bit for bit" if found.bit_equal else "to 1e-6" if found.equal else "no"
        table.add_row("activation displaced", f"{found.displaced_mass:.2%}, on {found.tokens:,} tokens")
        table.add_row("change of logits", f"{found.mean_change:.2e} on average, {found.max_change:.2e} at most")
        table.add_row("outputs are equal", equal)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Command line, see the top of this file."""
    args = parse_arguments(list(argv) if argv is not None else None)
    try:
        text = args.text.read_text(encoding="utf-8") if args.text is not None else ""
        if args.text is not None and not text.strip():
            sys.exit(f"resize.py: --text {args.text} is empty; give a file with some text")
        model, tokenizer = load_model(args.model, dtype=args.dtype)
        batches = inputs_of(text, model, tokenizer, args.max_length, args.batch_size) if text else []
        change = resize.grow if args.action == "grow" else resize.prune
        resized = change(
            model,
            args.checkpoint,
            args.output,
            args.rows,
            tag=args.tag,
            save_tag=args.output_tag,
            batches=batches,
        )
    except (ValueError, OSError, CheckpointSaveError) as error:
        inside = newest_whole(args.checkpoint)
        sys.exit(f"resize.py: {error}" + (f"; there is one in {inside}" if inside else ""))
    Console().print(show(resized))
    print(
        f'To go on with it, set "rows": {resized.rows} and "num_experts": {resized.num_experts} in "adapter" of the '
        'JSON\'s "meft" block.'
    )
    print(json.dumps(result_of(resized)))


if __name__ == "__main__":
    main()
