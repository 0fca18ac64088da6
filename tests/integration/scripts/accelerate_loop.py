"""Ten lines of accelerate; they know nothing of MEFT."""

import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import AutoModelForCausalLM

model_name, output, config = sys.argv[-3:]
torch.manual_seed(0)
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
model = AutoModelForCausalLM.from_pretrained(model_name)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = torch.utils.data.DataLoader(torch.randint(3, 90, (16, 12)), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(3):
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print(f"loss {loss.item():.6f}")
state_dict = accelerator.get_state_dict(model)
accelerator.unwrap_model(model).save_pretrained(output, state_dict=state_dict)
