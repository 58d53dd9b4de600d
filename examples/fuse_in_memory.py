"""Two source models, a text, and one optimizer step of the target: no recipe, no folder.

The models may be any causal language models of transformers that you have loaded.
"""

import argparse
import inspect
import json.decoder

import torch

import fusellm

texts = [inspect.getsource(json.decoder)[:2000], inspect.getsource(argparse)[:2000]]

# What each source says comes next, at each of its own tokens: 32 draws from each distribution.
read = {}
for name in ("python", "cpp"):
    model, tokenizer = fusellm.load_pretrained(f"zoo/{name}", device="cpu")
    read[name] = fusellm.read_distributions(model, tokenizer, texts, draws=32)

# Translated into the target's tokens and fused: at each position the source that fits best.
target, tokenizer = fusellm.load_pretrained("zoo/prose", device="cpu")
fused = fusellm.fuse(texts, tokenizer, read, "mince")
print(fused)
print("after the 20th token:", fused.at(0, 20)[:3], "\n")

# One step on L = λ·L_CLM + (1−λ)·L_Fusion, in a loop of one's own.
dataset = fusellm.FusedDataset(fused)
batch = fusellm.FusionCollator(dataset)([dataset[0], dataset[1]])
optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3)
target.train()
for step in range(3):
    hidden = fusellm.last_hidden(target, batch)
    loss = fusellm.fusion_loss(hidden, target, batch["labels"], batch["outcomes"], lambda_=0.9)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
