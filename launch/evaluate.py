"""Measures how many questions a model answers: exact match and token F1 of its greedy answers.

    python launch/evaluate.py --model MODEL [--adapter FOLDER] --data questions.jsonl more_questions.jsonl

With ``--log RUN`` the result is added to the log of a run, for ``meft-engine report``: as of the adapter's step, or of
step 0 for the base model.
The last line printed is one JSON object: ``{"questions": {"exact_match": …, "f1": …, "count": …}, …}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data import DataError, Source, read
from formats import pairs
from inference import DTYPES, greedy_answers, load_model
from rich.console import Console
from rich.table import Table
from scoring import exact_match, score

from meft_engine import run_log


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses data files whose results would carry the same name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of the base model")
    parser.add_argument("--adapter", help="folder of a saved adapter; without it the base model is measured")
    parser.add_argument("--data", nargs="+", required=True, help="files of JSON lines with prompt and completion")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is native")
    parser.add_argument("--predictions", type=Path, help="file to write every prompt, answer and truth to (JSON lines)")
    parser.add_argument("--log", type=Path, metavar="RUN", help="folder of a run whose log gets the result")
    args = parser.parse_args(argv)
    stems = [Path(path).stem for path in args.data]
    if len(set(stems)) < len(stems):
        parser.error(f"--data names two files with the same stem ({', '.join(stems)}); results are listed by stem")
    return args


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
        questions = {Path(path).stem: pairs(read(Source(path)), Source(path).name) for path in args.data}
    except DataError as error:
        sys.exit(f"evaluate.py: {error}")
    model, tokenizer = load_model(args.model, args.adapter, args.dtype)
    results, records = {}, []
    for stem, examples in questions.items():
        prompts, truths = [prompt for prompt, _ in examples], [truth.strip() for _, truth in examples]
        answers = greedy_answers(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, stem)
        results[stem] = score(answers, truths)
        for prompt, answer, truth in zip(prompts, answers, truths, strict=True):
            correct = bool(exact_match(answer, truth))
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
