"""Ten lines of TRL; they know nothing of MEFT."""

import os
import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model, data, output, config, steps = sys.argv[-5:]
settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 3, "logging_steps": 1, "seed": 5}
args = SFTConfig(output, deepspeed=config, max_steps=int(steps), use_cpu=True, bf16=False, report_to=[], **settings)
trainer = SFTTrainer(model, args=args, train_dataset=load_dataset("json", data_files=data, split="train"))
trainer.train(resume_from_checkpoint=os.path.isdir(f"{output}/checkpoint-3"))
trainer.save_model()
trainer.save_state()
