"""A training script as DeepSpeed's tutorial has it; it knows nothing of MEFT."""

import argparse

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--save", required=True)
    parser = deepspeed.add_config_arguments(parser)
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
        )
    )
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    batches = [torch.randint(3, 97, (4, 12)) for _ in range(2)]
    losses = []
    for _ in range(12):
        for ids in batches:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    engine.save_checkpoint(args.save, tag="last")
    result = {"engine": type(engine).__name__, "losses": losses, "parameters": engine.module.state_dict()}
    torch.save(result, f"{args.save}/result.pt")


if __name__ == "__main__":
    main()
