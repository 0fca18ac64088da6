"""Measures how many questions a model answers: exact match and token F1 of its greedy answers.

    python launch/evaluate.py --model MODEL [--adapter FOLDER] --data questions.jsonl more_questions.jsonl

A completion that is a list holds several right answers, of which each counts. With ``--final_number`` answers are
solutions of any number of lines, whose last numbers are compared.

With ``--log RUN`` the result is added to the log of a run, for ``meft-engine report``: as of the adapter's step, or of
step 0 for the base model.
The last line printed is one JSON object: ``{"questions": {"exact_match": …, "f1": …, "count": …}, …}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data import DataError, Source, read
from formats import Columns, questions
from inference import DTYPES, greedy_answers, load_model
from rich.console import Console
from rich.table import Table
from scoring import exact_match, final_number, normalize, score

from meft_engine import run_log


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or hub name of the base model")
    parser.add_argument("--adapter", help="folder of a saved adapter; without it the base model is measured")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or datasets of the hub")
    parser.add_argument("--dataset_config", help="which configuration of a hub's dataset")
    parser.add_argument("--dataset_split", default="train", help="which part, where there are several (default: train)")
    parser.add_argument("--prompt_column", default="prompt", help="of questions (default: prompt)")
    parser.add_argument(
        "--completion_column", default="completion", help="of answers: a text, or a list of which each is right"
    )
    parser.add_argument("--final_number", action="store_true", help="compare the last number of answers (GSM8K)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, help="of an answer: 16, or 256 with --final_number")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is native")
    parser.add_argument("--predictions", type=Path, help="file to write every prompt, answer and truth to (JSON lines)")
    parser.add_argument("--log", type=Path, metavar="RUN", help="folder of a run whose log gets the result")
    return parser


def parse_arguments(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The command line; refuses data files whose results would carry the same name."""
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    stems = [Path(path).stem for path in args.data]
    if len(set(stems)) < len(stems):
        parser.error(f"--data names two files with the same stem ({', '.join(stems)}); results are listed by stem")
    if args.max_new_tokens is None:
        args.max_new_tokens = 256 if args.final_number else 16
    return args


def load_questions(args: argparse.Namespace) -> dict[str, list[tuple[str, list[str]]]]:
    """Of each file, by its stem: the prompts and their right answers.

    Raises:
        DataError: if they cannot be read, or an answer has no number where one is to be compared.
    """
    columns, found = Columns(args.prompt_column, args.completion_column), {}
    for path in args.data:
        source = Source(path, args.dataset_config, args.dataset_split)
        found[Path(path).stem] = asked = questions(read(source), source.name, columns)
        for number, (_, truths) in enumerate(asked, 1):
            if args.final_number and not all(map(final_number, truths)):
                raise DataError(
                    f"example {number} of {source.name} has no number in {args.completion_column!r}; repair it, or "
                    "leave --final_number out to compare whole answers"
                )
    return found


def step_of(adapter: Path, run: Path) -> int:
    """The optimizer steps behind an adapter: as the Trainer's state says that was saved with it, or the run's log."""
    try:
        return json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        steps = [record["step"] for record in run_log.read(run) if record["kind"] == "step"]
        return steps[-1] if steps else 0


def main() -> None:
    """Command line, see the top of this file."""
    args = parse_arguments()
    try:
        asked = load_questions(args)
    except DataError as error:
        sys.exit(f"evaluate.py: {error}")
    model, tokenizer = load_model(args.model, args.adapter, args.dtype)
    results, records = {}, []
    one_line, form = not args.final_number, final_number if args.final_number else normalize
    for stem, examples in asked.items():
        prompts, truths = zip(*examples, strict=True)
        answers = greedy_answers(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, stem, one_line)
        results[stem] = score(answers, truths, form)
        for prompt, answer, right in zip(prompts, answers, truths, strict=True):
            correct, truth = bool(exact_match(answer, *right, form=form)), [text.strip() for text in right]
            truth = truth[0] if len(truth) == 1 else truth
            records.append({"data": stem, "prompt": prompt, "answer": answer, "truth": truth, "correct": correct})
    if args.predictions:
        args.predictions.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        args.predictions.write_text("".join(lines), encoding="utf-8")
    if args.log:
        step = step_of(Path(args.adapter), args.log) if args.adapter else 0
        run_log.append(args.log, "evaluation", step=step, model=args.model, adapter=args.adapter, results=results)
    table = Table("questions", "count", "exact match", "F1", title=f"{args.model}, {args.adapter or 'no adapter'}")
    for stem, result in results.items():
        table.add_row(stem, str(result["count"]), f"{result['exact_match']:.3f}", f"{result['f1']:.3f}")
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
