"""The command line of ``finetune.py``: its own options, those of TrainingArguments, and help on two screens."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn

from formats import FORMATS, Columns
from progress import MODES
from transformers import HfArgumentParser, TrainingArguments

_COMMON = {
    "output_dir": "where the adapter and checkpoints go",
    "deepspeed": "DeepSpeed JSON; its meft block makes this MEFT",
    "num_train_epochs": "3 if not given; a stream needs --max_steps instead",
    "per_device_train_batch_size": "examples in a micro-batch",
    "gradient_accumulation_steps": "micro-batches in a step",
    "learning_rate": "a few 1e-3 suit adapters",
    "lr_scheduler_type": "linear, cosine, constant, …",
    "bf16": "compute in bf16",
    "gradient_checkpointing": "trade time for memory",
    "eval_strategy": "no, steps or epoch",
    "save_strategy": "no, steps, epoch or best",
    "resume_from_checkpoint": "a folder, True: the newest one, auto: the newest whole one, if any",
    "report_to": "tensorboard, wandb, …",
}


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the base model"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernel, as transformers names them"})
    chat_template: str | None = field(default=None, metadata={"help": "file with a Jinja chat template"})
    progress: str = field(default="auto", metadata={"help": f"what the screen shows: {', '.join(MODES)}"})

    def __post_init__(self) -> None:
        if self.progress not in MODES:
            raise ValueError(f"progress = {self.progress!r} is not known; use {', '.join(MODES)}")


@dataclass
class DataArguments:
    """Data"""

    train_file: str | None = field(
        default=None, metadata={"help": "json, jsonl, csv, parquet or arrow file, or folder of such or of save_to_disk"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "dataset of the hub, in place of a file"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    dataset_split: str = field(default="train", metadata={"help": "which part to train on"})
    eval_file: str | None = field(default=None, metadata={"help": "what to validate with, as --train_file"})
    eval_split: str | None = field(default=None, metadata={"help": "… or a part of --dataset_name"})
    eval_share: float = field(default=0.0, metadata={"help": "… or this share of the training data, set aside"})
    streaming: bool = field(default=False, metadata={"help": "read while training; for data larger than the disk"})
    data_format: str = field(default="auto", metadata={"help": f"auto, {', '.join(FORMATS)}"})
    prompt_column: str = field(default="prompt", metadata={"help": "name of the column with prompts"})
    completion_column: str = field(default="completion", metadata={"help": "… with completions"})
    messages_column: str | None = field(default=None, metadata={"help": "… with lists of messages"})
    text_column: str = field(default="text", metadata={"help": "… with plain text"})
    packing: bool = field(default=True, metadata={"help": "fill blocks with several plain texts"})
    max_length: int = field(default=512, metadata={"help": "longer examples are dropped and counted; text is cut"})

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} holds no prompt and completion; use 2 or more tokens")
        if self.data_format not in ("auto", *FORMATS):
            raise ValueError(f"data_format = {self.data_format!r} is not known; use auto, {', '.join(FORMATS)}")
        if (self.train_file is None) == (self.dataset_name is None):
            given = "neither" if self.train_file is None else "both"
            raise ValueError(f"of --train_file and --dataset_name, {given} is given; name the data by one of them")
        ways = [self.eval_file is not None, self.eval_split is not None, self.eval_share != 0]
        if sum(ways) > 1:
            raise ValueError("of --eval_file, --eval_split and --eval_share, more than one is given; choose one")
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError("--eval_split names a part of --dataset_name, which is not given; use --eval_file")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share = {self.eval_share:g} is not a share; use a number from 0 to less than 1")
        if self.streaming and self.eval_share:
            raise ValueError("--eval_share needs to know all examples, which --streaming does not; use --eval_file")

    def columns(self) -> Columns:
        """The names of the columns."""
        return Columns(self.prompt_column, self.completion_column, self.messages_column, self.text_column)


class Parser(HfArgumentParser):
    """Own options first, the most used of Trainer's after them; mistakes get one sentence and no page of usage."""

    def __init__(self) -> None:
        super().__init__((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
        self.add_argument("--help_all", action=_HelpAll)

    def format_help(self) -> str:
        """What fits on two screens."""
        lines = [
            "usage: deepspeed launch/finetune.py --model_name_or_path MODEL --train_file FILE --output_dir FOLDER …"
        ]
        for section in (ModelArguments, DataArguments):
            lines += ["", f"{section.__doc__}:"]
            lines += [_line(f.name, f.metadata["help"], f.default) for f in fields(section)]
        lines += ["", "Training (any option of transformers.TrainingArguments; --help_all lists them):"]
        lines += [_line(name, text) for name, text in _COMMON.items()]
        return "\n".join(lines) + "\n"

    def format_everything(self) -> str:
        """argparse's own help."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One sentence, and exit code 2."""
        sys.exit(_exit_with(message))

    def parse(self, arguments: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
        """The three groups of options.

        Raises:
            SystemExit: with one sentence, for anything that is wrong with them.
        """
        try:
            *groups, rest = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        except ValueError as error:
            self.error(" ".join(str(error).split()))
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            guess = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
            remedy = f"did you mean {guess[0]}?" if guess else "--help_all lists those that are"
            self.error(f"{rest[0]} is not an option; {remedy}")
        return tuple(groups)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(
            option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help="every option"
        )

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_everything())
        parser.exit()


def _exit_with(message: str) -> int:
    print(f"finetune.py: {message}", file=sys.stderr)
    return 2


def _line(name: str, text: str, default: Any = None) -> str:
    shown = "" if default in (None, MISSING, False) else f" [{default}]"
    return f"  --{name:<27} {text}{shown}"
