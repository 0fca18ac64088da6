"""Causal language modelling, built like the examples of transformers; it knows nothing of MEFT."""

import os
from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "the checkpoint for weights initialization"})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "the training data, a JSON file"})
    validation_file: str = field(metadata={"help": "the evaluation data, a JSON file"})
    block_size: int = field(default=16, metadata={"help": "input sequence length after tokenization"})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw_datasets = datasets.load_dataset("json", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    def tokenize_function(examples: dict) -> dict:
        return tokenizer(examples["text"])

    def group_texts(examples: dict) -> dict:
        concatenated = {k: sum(examples[k], []) for k in ("input_ids", "attention_mask")}
        size = data_args.block_size
        total = len(concatenated["input_ids"]) // size * size
        result = {k: [t[i : i + size] for i in range(0, total, size)] for k, t in concatenated.items()}
        result["labels"] = [list(ids) for ids in result["input_ids"]]
        return result

    columns = raw_datasets["train"].column_names
    lm_datasets = raw_datasets.map(tokenize_function, batched=True, remove_columns=columns)
    lm_datasets = lm_datasets.map(group_texts, batched=True)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=lm_datasets["train"] if training_args.do_train else None,
        eval_dataset=lm_datasets["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )

    if training_args.do_train:
        checkpoint = None
        if training_args.resume_from_checkpoint is not None:
            checkpoint = training_args.resume_from_checkpoint
        elif last_checkpoint is not None:
            checkpoint = last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        predictions = trainer.predict(lm_datasets["validation"]).predictions
        np.save(os.path.join(training_args.output_dir, "predictions.npy"), predictions)


if __name__ == "__main__":
    main()
