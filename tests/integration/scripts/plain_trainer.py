"""A training script as the manual of transformers has it; it knows nothing of MEFT."""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Texts(Dataset):
    """24 fixed texts of 12 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 97, (24, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--save", required=True)
    parser.add_argument("--resume", default=None)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            attention_dropout=0.1,
        )
    )
    training = TrainingArguments(
        output_dir=args.save,
        deepspeed=args.deepspeed,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        warmup_steps=2,
        optim="adamw_torch",
        use_cpu=True,
        seed=3,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=training, train_dataset=Texts(), eval_dataset=Texts())
    trainer.train(resume_from_checkpoint=args.resume)
    result = {
        "engine": type(trainer.model_wrapped).__name__,
        "log": trainer.state.log_history,
        "evaluation": trainer.evaluate()["eval_loss"],
        "parameters": model.state_dict(),
    }
    torch.save(result, f"{args.save}/result.pt")


if __name__ == "__main__":
    main()
