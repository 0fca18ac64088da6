"""Answers prompts with a saved adapter, or chats with it.

    python launch/generate.py --model MODEL --adapter FOLDER --prompt "The airport ZRH is in which city?"
    python launch/generate.py --model MODEL --adapter FOLDER --file prompts.txt
    python launch/generate.py --model MODEL --adapter FOLDER --chat

Without any of the three, every line of the standard input is a prompt. Each answer is printed on a line of its own. A
chat uses the tokenizer's chat template and ends with an empty line, /exit or Ctrl-D.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from chat import chat, require_template
from inference import DTYPES, greedy_answers, load_model, load_tokenizer


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with ``prompts`` read from wherever they are; ``None`` for a chat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of the base model")
    parser.add_argument("--adapter", help="folder of a saved adapter; without it the base model answers")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    source.add_argument("--file", help="text file with a prompt on each line")
    source.add_argument("--chat", action="store_true", help="chat in the terminal")
    parser.add_argument("--system", help="what a chat begins with")
    parser.add_argument("--rows", choices=["host", "device"], default="host", help="where the adapter's values are")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, help="of an answer: 64, or in a chat 256")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is native")
    args = parser.parse_args(arguments)
    if args.system is not None and not args.chat:
        parser.error("--system belongs to --chat")
    if args.max_new_tokens is None:
        args.max_new_tokens = 256 if args.chat else 64
    if args.chat:
        args.prompts = None
        return args
    if args.file is not None and not Path(args.file).is_file():
        parser.error(f"--file {args.file} does not exist; give a text file with a prompt on each line")
    lines = Path(args.file).read_text(encoding="utf-8").splitlines() if args.file is not None else sys.stdin
    args.prompts = args.prompt or [line.rstrip("\n") for line in lines if line.strip()]
    if not args.prompts:
        parser.error("there is no prompt; give --prompt, or lines in --file or on standard input")
    return args


def main() -> None:
    """Command line, see the top of this file."""
    args = parse_arguments()
    if args.chat:
        try:
            # Before minutes are spent on the model.
            require_template(load_tokenizer(args.model, args.adapter))
        except ValueError as error:
            sys.exit(f"generate.py: {error}")
    model, tokenizer = load_model(args.model, args.adapter, args.dtype, args.rows)
    if args.chat:
        chat(model, tokenizer, args.max_new_tokens, args.system)
        return
    for answer in greedy_answers(model, tokenizer, args.prompts, args.batch_size, args.max_new_tokens):
        print(answer)


if __name__ == "__main__":
    main()
