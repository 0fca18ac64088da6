"""A reader's own script, as the manual of transformers has it; it knows nothing of MEFT."""

import argparse

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--deepspeed", default="ds_config.json")
arguments = parser.parse_args()

texts = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(1))
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained("MODEL"),
    args=TrainingArguments("runs/own", deepspeed=arguments.deepspeed, max_steps=2, logging_steps=1, report_to=[]),
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
)
trainer.train()
trainer.save_model()
print("trained by", type(trainer.model_wrapped).__name__)
