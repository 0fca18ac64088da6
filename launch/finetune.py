"""Fine-tunes a causal language model through DeepSpeed and the HF Trainer.

    deepspeed launch/finetune.py --model_name_or_path MODEL --train_file train.jsonl \\
        --output_dir runs/first --deepspeed ds_configs/meft_24gb.json --num_train_epochs 3

With a ``"meft"`` block in the DeepSpeed JSON the base model is frozen, an adapter is trained, and the output folder
holds the adapter. Without one, or with one that is disabled, this is plain full fine-tuning. ``formats.py`` says what
data may look like. Every option of ``transformers.TrainingArguments`` works, ``--resume_from_checkpoint`` included.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from collator import Collator
from data import DataError, Source, columns_of, hold_out, read
from finetune_arguments import DataArguments, ModelArguments, Parser
from formats import Encoder, detect
from lengths import measure, table
from progress import Progress
from resuming import newest_whole
from rich.console import Console
from stopping import EXIT_CODE, StopOnSignal, StopRequested
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import meft_engine

REPORT = "train_report.json"


class StepTimer(TrainerCallback):
    """Times every optimizer step, its micro-steps included, but neither evaluation nor saving."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it; what a GPU still has to do counts."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)

    def typical(self) -> float | None:
        """The median, which a slow first step does not move."""
        return statistics.median(self.seconds) if self.seconds else None


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The folder to resume from: the one that was asked for, or the newest of ``output_dir`` for ``True``.

    ``auto`` is the newest whole checkpoint if there is one, and else the start: for jobs that are started again.

    Raises:
        DataError: when there is no such checkpoint. Training from the start in its place would go unnoticed.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() == "auto":
        whole = newest_whole(output_dir)
        return None if whole is None else str(whole)
    folder = (get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None) if asked == "True" else asked
    if folder is None or not Path(folder, "trainer_state.json").is_file():
        raise DataError(
            f"resume_from_checkpoint = {asked!r} names no checkpoint (output_dir is {output_dir!r}); give a folder "
            "such as output_dir/checkpoint-100, or leave the option out to start anew"
        )
    return folder


def is_validated(trainer: Trainer) -> bool:
    """Whether the weights as they are now have been validated; after training, the best ones may have come back."""
    if trainer.args.load_best_model_at_end:
        return False
    return any("eval_loss" in e and e["step"] == trainer.state.global_step for e in trainer.state.log_history)


def train_report(trainer: Trainer, timer: StepTimer, train_loss: float) -> dict[str, Any]:
    """What the engine says about its adapter (nothing for plain DeepSpeed), the number of steps and their speed."""
    engine_report = getattr(trainer.model_wrapped, "meft_report", dict)()
    return {
        **engine_report,
        "seconds_per_step": timer.typical(),
        "steps": trainer.state.global_step,
        "train_loss": train_loss,
    }


def summary(report: dict[str, Any]) -> str:
    """The report in one line."""
    parts = [f"{report['steps']} steps", f"training loss {report['train_loss']:.3f}"]
    if report["seconds_per_step"] is not None:
        parts.append(f"{report['seconds_per_step']:.2f} s a step")
    if "adapter_parameters" in report:
        parts.append(f"{report['adapter_parameters'] / 1e6:.1f} M adapter parameters")
        parts.append(f"{report['touched_share']:.1%} of the rows touched by a micro-batch")
    return "Finished: " + ", ".join(parts)


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """With a padding token, and the chat template that was asked for.

    Raises:
        DataError: if the template's file is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.chat_template is not None:
        file = Path(args.chat_template)
        if not file.is_file():
            raise DataError(f"chat_template = {args.chat_template!r} does not exist; give a file with a Jinja template")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def load_examples(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Any]:
    """Encoded examples: ``train``, and ``eval`` where there is something to validate with.

    Raises:
        DataError: if they cannot be used.
    """
    train = Source(args.train_file or args.dataset_name, args.dataset_config, args.dataset_split)
    sources = {"train": (train, read(train, streaming=args.streaming))}
    if args.eval_file is not None or args.eval_split is not None:
        held_out = Source(args.eval_file or args.dataset_name, args.dataset_config, args.eval_split or "train")
        sources["eval"] = (held_out, read(held_out))
    elif args.eval_share:
        parts = hold_out(sources["train"][1], args.eval_share, seed)
        sources = {name: (train, part) for name, part in zip(("train", "eval"), parts, strict=True)}
    encoded = {}
    for kind, (source, examples) in sources.items():
        form = args.data_format
        if form == "auto":
            form = detect(columns_of(examples), args.columns(), source.name)
        encoder = Encoder(tokenizer, form, source.name, args.max_length, args.columns(), args.packing)
        encoded[kind] = encoder.encode(examples)
    return encoded


def require_steps(args: TrainingArguments, streaming: bool) -> None:
    """A stream has no end that epochs could be counted by.

    Raises:
        DataError: if the number of steps is not given.
    """
    if streaming and args.max_steps <= 0:
        raise DataError("--streaming does not know how many examples there are; say how long to train in --max_steps")


def require_deepspeed(trainer: Trainer) -> None:
    """Whoever names a DeepSpeed JSON gets what it says: accelerate leaves it out where its environment asks for a CPU.

    Raises:
        DataError: if the whole model would be trained in place of an adapter.
    """
    if trainer.args.deepspeed is not None and not trainer.is_deepspeed_enabled:
        raise DataError(
            f"deepspeed = {trainer.args.deepspeed!r} would not be used: accelerate was told "
            f"{trainer.accelerator.distributed_type} by its environment; unset ACCELERATE_USE_CPU and the like, "
            "and give --use_cpu to train on a CPU"
        )


def log_level(args: TrainingArguments, progress: str) -> int:
    """Of this process's messages; ``--progress quiet`` also spares those that only inform."""
    if not args.should_log:
        return logging.ERROR
    return logging.WARNING if progress == "quiet" else logging.INFO


def run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Read the data, train, save.

    Raises:
        DataError, MeftConfigError: one sentence each, for what cannot work.
    """
    progress = Progress(model_args.progress)
    progress.silence_others()
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "non_padding"  # for tokens a second
    set_seed(args.seed)
    require_steps(args, data_args.streaming)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    tokenizer = load_tokenizer(model_args)
    with args.main_process_first(desc="reading the data"):
        data = load_examples(data_args, tokenizer, args.seed)
    if args.should_log and progress.shows_data:
        Console().print(table([measure(name, examples) for name, examples in data.items()], data_args.max_length))

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, dtype=dtype, attn_implementation=model_args.attn_implementation
    )
    timer = StepTimer()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[timer, StopOnSignal()],
    )
    require_deepspeed(trainer)
    progress.replace_in(trainer)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except StopRequested:
        trainer.model_wrapped.destroy()  # waits for a save in the background
        leave_group()
        raise
    finally:
        progress.close()
    if "eval" in data and not is_validated(trainer):
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    report = train_report(trainer, timer, result.training_loss)
    if trainer.is_world_process_zero():
        Path(args.output_dir, REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        progress.end(summary(report), report)
    leave_group()


def leave_group() -> None:
    """Take leave of the other ranks; otherwise one may abort on its way out."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Command line, see the top of this file."""
    meft_engine.enable()  # before the Trainer asks DeepSpeed for its engine
    model_args, data_args, args = Parser().parse()
    logging.basicConfig(level=log_level(args, model_args.progress))
    try:
        run(model_args, data_args, args)
    except (DataError, meft_engine.MeftConfigError) as error:
        sys.exit(f"finetune.py: {error}")
    except StopRequested as request:
        print(f"finetune.py: {request}", file=sys.stderr)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
