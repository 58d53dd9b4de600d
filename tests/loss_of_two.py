"""What two processes do in test_library.py: the loss in a loop of one's own, under DDP."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import fusellm


def work(rank: int, place: str) -> None:
    """Take this process' rows of a batch, of which the other one has more, and save gradients."""
    torch.set_num_threads(1)
    meeting = f"file://{place}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    batch = torch.load(f"{place}/batch-{rank}.pt", weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(f"{place}/model")
    ddp = DistributedDataParallel(model)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    predicted = (labels[:, 1:] != -100).sum().float()
    dist.all_reduce(predicted)
    hidden = ddp(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1)
    loss = fusellm.fusion_loss(
        hidden.hidden_states[-1], ddp, labels, batch["outcomes"], 0.5, count=predicted / 2
    )
    loss.backward()
    if rank == 0:
        grads = {name: p.grad for name, p in model.named_parameters()}
        torch.save(grads, Path(place) / "gradients.pt")
    dist.destroy_process_group()
