"""Fine-tunes a causal language model on prompts and completions, through DeepSpeed and the HF Trainer.

    deepspeed launch/finetune.py --model_name_or_path MODEL --train_file train.jsonl \\
        --output_dir runs/first --deepspeed ds_configs/meft_24gb.json --num_train_epochs 3

With a ``"meft"`` block in the DeepSpeed JSON the base model is frozen, an adapter is trained, and the output folder
holds the adapter. Without one, or with one that is disabled, this is plain full fine-tuning. Every option of
``transformers.TrainingArguments`` works, ``--resume_from_checkpoint`` included.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from completions import CompletionCollator, load_examples, tokenize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import meft_engine

REPORT = "train_report.json"


@dataclass
class ModelArguments:
    """What is fine-tuned."""

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the base model"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernel, as transformers names them"})


@dataclass
class DataArguments:
    """What it learns."""

    train_file: str = field(metadata={"help": "JSON lines with a prompt and a completion each"})
    eval_file: str | None = field(default=None, metadata={"help": "the same for --eval_strategy and the final loss"})
    prompt_column: str = field(default="prompt", metadata={"help": "name of the column with the prompt"})
    completion_column: str = field(default="completion", metadata={"help": "name of the column with the completion"})
    max_length: int = field(default=512, metadata={"help": "longer examples are dropped, and counted in a warning"})

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} holds no prompt and completion; use 2 or more tokens")


class AdapterTrainer(Trainer):
    """A Trainer that saves the adapter; the Trainer of transformers would save the frozen base and none of its rows."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter and tokenizer; every rank has to call this. Falls back to the whole model without an adapter."""
        if not hasattr(self.model_wrapped, "save_adapter"):
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model_wrapped.save_adapter(str(folder))
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


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

    Raises:
        ValueError: when there is no such checkpoint. Training from the start in its place would go unnoticed.
    """
    if asked is None or asked.lower() == "false":
        return None
    folder = (get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None) if asked == "True" else asked
    if folder is None or not Path(folder, "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint = {asked!r} names no checkpoint (output_dir is {output_dir!r}); give a folder "
            "such as output_dir/checkpoint-100, or leave the option out to start anew"
        )
    return folder


def train_report(trainer: AdapterTrainer, timer: StepTimer, train_loss: float) -> dict[str, Any]:
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


def main() -> None:
    """Command line, see the top of this file."""
    meft_engine.enable()  # before the Trainer asks DeepSpeed for its engine
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO if args.should_log else logging.ERROR)
    set_seed(args.seed)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = {}
    for name, path in (("train_file", data_args.train_file), ("eval_file", data_args.eval_file)):
        if path is not None:
            with args.main_process_first(desc=f"reading {name}"):
                examples = load_examples(path, data_args.prompt_column, data_args.completion_column)
                data[name] = tokenize(examples, tokenizer, data_args.max_length, name)

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, dtype=dtype, attn_implementation=model_args.attn_implementation
    )
    timer = StepTimer()
    trainer = AdapterTrainer(
        model=model,
        args=args,
        train_dataset=data["train_file"],
        eval_dataset=data.get("eval_file"),
        data_collator=CompletionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if "eval_file" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    report = train_report(trainer, timer, result.training_loss)
    if trainer.is_world_process_zero():
        Path(args.output_dir, REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(summary(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # otherwise a rank may abort on its way out


if __name__ == "__main__":
    main()
