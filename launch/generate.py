"""Answers prompts with a saved adapter.

    python launch/generate.py --model MODEL --adapter FOLDER --prompt "The airport ZRH is in which city?"

Without ``--prompt`` every line of the standard input is a prompt; each answer is printed on a line of its own.
"""

from __future__ import annotations

import argparse
import sys

from inference import DTYPES, greedy_answers, load_model


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of the base model")
    parser.add_argument("--adapter", help="folder of a saved adapter; without it the base model answers")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts; without it they are read from standard input")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is native")
    args = parser.parse_args()
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        parser.error("there is no prompt; give --prompt or lines on standard input")
    model, tokenizer = load_model(args.model, args.adapter, args.dtype)
    for answer in greedy_answers(model, tokenizer, prompts, args.batch_size, args.max_new_tokens):
        print(answer)


if __name__ == "__main__":
    main()
