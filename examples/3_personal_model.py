"""One client's model in transformers: `python examples/3_personal_model.py MIXTURE RUN CLIENT`.

It generates, and it goes on training: what is the client's own are its only trainable parameters.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pomona

mixture, run, client = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
model = pomona.load_personal(mixture, run / "clients" / client / "graft", run / "shared")
tokenizer = AutoTokenizer.from_pretrained(mixture)

prompt = "### Instruction:\nWhat of the plum in spring?\n\n### Response:\n"
ids = tokenizer(prompt, return_tensors="pt")
said = model.generate(**ids, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

own = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in own):,} of {model.num_parameters():,} parameters are trained")
optimiser = torch.optim.AdamW(own, lr=1e-3)
for step in range(3):
    loss = model(**ids, labels=ids["input_ids"]).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    print(f"step {step}: {loss.item():.3f}")
