"""The three specialists of the zoo: what each is made of and how it is trained.

Each has its own architecture and tokenizer, as the paper's Llama-2, OpenLLaMA and MPT have, and
knows one domain best.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fusellm.models.heads import head_of, hidden_states
from fusellm.objective.chunked import objective
from fusellm.tokens.blocks import cut
from fusellm.zoo.text import DOMAINS, Document
from fusellm.zoo.tokenizers import byte_level_bpe, byte_level_unigram, sentencepiece_like_bpe

CONTEXT_TOKENS = 1280  # more than any block of BLOCK_BYTES can have
BLOCK_BYTES = 1024
_TOKENIZER_TEXT_BYTES = 6_000_000
_HIDDEN, _LAYERS, _HEADS = 128, 4, 4


@dataclass(frozen=True)
class Specialist:
    """One model of the zoo.

    Attributes:
        domain: the domain that it knows best.
        tokenizer_size: tokens of its vocabulary.
        train_bytes: text that it is trained on, repetitions included.
        own_share: share of `domain` in it; the other domains share the rest equally.
        seed: of weights, mixture and order.
    """

    name: str
    domain: str
    architecture: str
    tokenizer: str
    tokenizer_size: int
    train_bytes: int
    own_share: float = 0.8
    batch_blocks: int = 16
    peak_learning_rate: float = 3e-3
    seed: int = 0


SPECIALISTS = {
    "prose": Specialist("prose", "prose", "llama", "sentencepiece_like_bpe", 8192, 18_000_000),
    "python": Specialist(
        "python", "python", "gpt_neox", "byte_level_bpe", 8192, 22_000_000, seed=1
    ),
    "cpp": Specialist("cpp", "cpp", "mpt", "byte_level_unigram", 7168, 18_000_000, seed=2),
}

_TOKENIZERS: dict[str, Callable[[Iterator[str], int], PreTrainedTokenizerFast]] = {
    "sentencepiece_like_bpe": sentencepiece_like_bpe,
    "byte_level_bpe": byte_level_bpe,
    "byte_level_unigram": byte_level_unigram,
}


@dataclass(frozen=True)
class Step:
    """Progress of a specialist's training. `loss_nats` is the mean per token since the last."""

    step: int
    steps: int
    loss_nats: float
    tokens: int
    seconds: float


def train_tokenizer(
    specialist: Specialist, documents: Sequence[Document]
) -> PreTrainedTokenizerFast:
    """Train a specialist's tokenizer on a mixture, half of it its own domain."""
    texts = _mixture(specialist, documents, _TOKENIZER_TEXT_BYTES, own_share=0.5)
    return _TOKENIZERS[specialist.tokenizer](
        (document.text for document in texts), specialist.tokenizer_size
    )


def train(
    specialist: Specialist,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
) -> Iterator[tuple[PreTrainedModel, Step]]:
    """Train a specialist from scratch on the zoo's part of the built-in corpus, step by step.

    AdamW (0.9, 0.95), weight decay 0.1, clipping 1, warm-up over 2 % and cosine decay to a tenth.
    """
    torch.manual_seed(specialist.seed)
    model = build(specialist, tokenizer)
    mixture = _mixture(specialist, documents, specialist.train_bytes, specialist.own_share)
    batches = _batches(specialist, _encode(mixture, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), specialist.peak_learning_rate, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    began, tokens, loss_nats = time.perf_counter(), 0, 0.0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = specialist.peak_learning_rate * _schedule(step, len(batches))
        ids, mask = _pad(batch)
        hidden = hidden_states(model, input_ids=ids, attention_mask=mask)
        predicted = mask[:, 1:].bool()
        labels = ids[:, 1:][predicted]
        head, count = head_of(model), len(labels)
        mean = objective(hidden[:, :-1][predicted], head, labels, count=count).total
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(predicted.sum())
        loss_nats = mean.item()
        yield model, Step(step + 1, len(batches), loss_nats, tokens, time.perf_counter() - began)


def build(specialist: Specialist, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A specialist with fresh weights."""
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    if specialist.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=_HIDDEN,
                intermediate_size=352,
                num_hidden_layers=_LAYERS,
                num_attention_heads=_HEADS,
                max_position_embeddings=CONTEXT_TOKENS,
                **tokens,
            )
        )
    if specialist.architecture == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=_HIDDEN,
                intermediate_size=4 * _HIDDEN,
                num_hidden_layers=_LAYERS,
                num_attention_heads=_HEADS,
                max_position_embeddings=CONTEXT_TOKENS,
                **tokens,
            )
        )
    return MptForCausalLM(
        MptConfig(
            d_model=_HIDDEN,
            n_layers=_LAYERS,
            n_heads=_HEADS,
            max_seq_len=CONTEXT_TOKENS,
            **tokens,
        )
    )


def save(
    specialist: Specialist,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
) -> None:
    """Write weights in half precision, tokenizer and card."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def card(specialist: Specialist, last: Step, bits_per_byte: dict[str, float]) -> str:
    """The model card of a specialist. `bits_per_byte` is of the validation part."""
    rows = "\n".join(f"| {domain} | {bits_per_byte[domain]:.3f} |" for domain in DOMAINS)
    settings = "\n".join(f"- {key}: {value}" for key, value in asdict(specialist).items())
    return (
        f"---\nlicense: apache-2.0\n---\n# zoo/{specialist.name}\n\n"
        f"A small {specialist.architecture} model that knows {specialist.domain} best, for trying "
        "fusellm with no download. Made by `fusellm zoo train`.\n\n"
        "## Data\n\nThe `zoo` part of the built-in corpus: docstrings, Python code and C++ headers "
        "of the standard library, numpy, torch and transformers, near-duplicates of the other "
        f"parts left out.\n\n## Training\n\n{settings}\n- steps: {last.steps}\n"
        f"- tokens: {last.tokens}\n- last loss: {last.loss_nats:.3f} nats per token\n\n"
        "## Bits per byte, validation part of the built-in corpus\n\n| domain | bits per byte |\n"
        f"|---|---|\n{rows}\n"
    )


def _mixture(
    specialist: Specialist, documents: Sequence[Document], total_bytes: int, own_share: float
) -> list[Document]:
    rng = random.Random(specialist.seed)
    chosen: list[Document] = []
    for domain in DOMAINS:
        share = own_share if domain == specialist.domain else (1 - own_share) / 2
        pool = [document for document in documents if document.domain == domain]
        taken_bytes = 0
        while pool and taken_bytes < share * total_bytes:
            rng.shuffle(pool)
            for document in pool:
                if taken_bytes >= share * total_bytes:
                    break
                chosen.append(document)
                taken_bytes += len(document.text.encode())
    return chosen


def _encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sequences: list[list[int]] = []
    cache: dict[str, list[list[int]]] = {}
    for document in documents:
        if document.name not in cache:
            blocks = list(cut(document.text, BLOCK_BYTES))
            encoded = tokenizer(blocks, add_special_tokens=False, split_special_tokens=True)
            ids = [bos + block for block in encoded["input_ids"]]
            ids[-1] = [*ids[-1], tokenizer.eos_token_id]
            cache[document.name] = ids
        sequences.extend(cache[document.name])
    return sequences


def _batches(specialist: Specialist, sequences: list[list[int]]) -> list[list[list[int]]]:
    rng = random.Random(specialist.seed)
    rng.shuffle(sequences)
    size, window = specialist.batch_blocks, 32 * specialist.batch_blocks
    batches = []
    for start in range(0, len(sequences), window):
        alike = sorted(sequences[start : start + window], key=len)
        batches += [alike[at : at + size] for at in range(0, len(alike), size)]
    rng.shuffle(batches)
    return batches


def _pad(batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
