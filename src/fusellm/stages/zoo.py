"""zoo train: make the small models that come with fusellm."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusellm.errors import ModelError
from fusellm.evaluation.text.nats import blocks_nats, by_domain
from fusellm.progress import Progress
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusellm.zoo import text
from fusellm.zoo.specialists import (
    BLOCK_BYTES,
    SPECIALISTS,
    Specialist,
    Step,
    card,
    save,
    train,
    train_tokenizer,
)

_VALIDATION_BYTES = 150_000  # a domain
_BATCH_TOKENS = 8192


def make_zoo(
    out: Path, only: Sequence[str] | None, share: float, progress: Progress
) -> dict[str, dict[str, float]]:
    """Train specialists and write each to `out/<name>`.

    Args:
        only: names; None for all.
        share: of each specialist's training text.

    Returns:
        Bits per byte of each specialist on the validation part, by domain.

    Raises:
        ModelError: an unknown name.
    """
    for name in only or ():
        if name not in SPECIALISTS:
            raise ModelError(f"the zoo has no {name!r}; it has {', '.join(SPECIALISTS)}")
    with progress.start("reading text", text.count_files(), "files") as bar:
        documents = list(text.documents(text.PARTS, on_file=bar.advance))
    apart = [document for document in documents if document.part != "zoo"]
    training = [document for document in documents if document.part == "zoo"]
    training, dropped = text.drop_near_duplicates(apart, training)
    progress.say(f"{dropped} near-duplicates of the other parts left out")
    bits_per_byte = {}
    for name in only or SPECIALISTS:
        whole = SPECIALISTS[name]
        specialist = dataclasses.replace(whole, train_bytes=int(whole.train_bytes * share))
        tokenizer = train_tokenizer(specialist, training)
        model, step = trained(specialist, tokenizer, training, f"zoo/{name}", progress)
        bits_per_byte[name] = _validate(model, Encoder(tokenizer), apart)
        save(specialist, model, tokenizer, out / name, card(specialist, step, bits_per_byte[name]))
    return bits_per_byte


def trained(
    specialist: Specialist,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[text.Document],
    name: str,
    progress: Progress,
) -> tuple[PreTrainedModel, Step]:
    """(a specialist trained from scratch, its last step), with a bar called by `name`."""
    with progress.start(f"training {name}", 0, "steps") as bar:
        for made in train(specialist, tokenizer, documents):
            bar.resize(made[1].steps)
            bar.advance(1, f"loss {made[1].loss_nats:.2f} nats per token")
    return made


def _validate(
    model: PreTrainedModel, encoder: Encoder, documents: Sequence[text.Document]
) -> dict[str, float]:
    domains, blocks, last = [], [], []
    for domain in text.DOMAINS:
        chosen = [d for d in documents if d.domain == domain and d.part == "validation"]
        random.Random(0).shuffle(chosen)
        room = _VALIDATION_BYTES
        for document in chosen:
            if room <= 0:
                break
            room -= len(document.text.encode())
            pieces = list(cut(document.text, BLOCK_BYTES))
            blocks += pieces
            last += [False] * (len(pieces) - 1) + [True]
            domains += [domain] * len(pieces)
    encoded = encoder.encode(blocks, last)
    lengths = [len(block.encode()) for block in blocks]
    return by_domain(domains, blocks_nats(model, encoded, lengths, _BATCH_TOKENS))
