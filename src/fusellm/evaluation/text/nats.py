"""Bits per byte: a model's cross-entropy against text, comparable between tokenizers.

L bytes of a block.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.fusion.cross_entropy import NATS_PER_BIT, nats_by_byte
from fusellm.models.heads import head_of, is_sharded, through_head
from fusellm.reading.batches import cut_rows, read_blocks, true_log_probs
from fusellm.tokens.context import Spans, context_bytes
from fusellm.tokens.encode import Encoded


def blocks_nats(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    lengths_bytes: Sequence[int],
    batch_tokens: int | None,
    on_block: Callable[[], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[np.ndarray | None]:
    """Each block's nats by byte, read from the block's beginning.

    Args:
        share: (n, of): this process' number among those that divide the blocks; those of the
            others are NaN.

    Returns:
        A [L] float64 array a block, NaN where nothing was predicted (the first token's bytes of a
        model before whose texts nothing is put); None where the tokenizer's walk failed.
    """
    head = None if is_sharded(model) else head_of(model).widened()
    nats: list[np.ndarray | None] = [
        None if block.ends is None else np.full(length, np.nan)
        for block, length in zip(encoded, lengths_bytes, strict=True)
    ]
    readable = [block.ids if block.ends is not None else block.ids[:0] for block in encoded]

    def use(_: list[int], hidden: torch.Tensor, true_ids: torch.Tensor) -> np.ndarray:
        if head is not None:
            log_probs = true_log_probs(head, hidden, true_ids)
        else:
            log_probs = through_head(
                model, hidden, lambda h, whole: true_log_probs(whole, h, true_ids)
            )
        values: np.ndarray = log_probs.cpu().numpy()
        return values

    for batch, log_probs in read_blocks(model, readable, batch_tokens, use, share=share):
        rows = cut_rows(log_probs, [len(readable[n]) - 1 for n in batch])
        for n, row in zip(batch, rows, strict=True):
            ends = encoded[n].ends
            assert ends is not None
            nats[n] = _by_byte(encoded[n], ends, row, lengths_bytes[n])
            if on_block is not None:
                on_block()
    return nats


def _by_byte(block: Encoded, ends: np.ndarray, nats: np.ndarray, length: int) -> np.ndarray:
    """[L] nats of a block's bytes; of a conversation, those of what is learnt of it.

    Args:
        nats: [T − 1] log-probabilities of all tokens but the first.
    """
    if block.predicted is None:
        whole = np.array([0, len(ends)]), np.array([0, length])
        return nats_by_byte(ends, whole[0], nats, whole[1], block.prefix_tokens)
    at = np.flatnonzero(block.predicted)
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    scored = np.full(length, np.nan)
    for run in runs:  # what one message says, and the end of its turn
        start, end = ends[run[0] - 1], ends[run[-1]]
        own = np.concatenate([[0], ends[run] - start])
        places = np.array([0, len(own)]), np.array([0, end - start])
        scored[start:end] = nats_by_byte(own, places[0], nats[run - 1], places[1], 1)
    return scored


def without_context(
    nats: Sequence[np.ndarray | None], context: Sequence[Spans]
) -> list[np.ndarray | None]:
    """Nats by byte with those of context, which no model is asked to predict, as not scored.

    Args:
        context: of each block.
    """
    scored_nats = []
    for own, spans in zip(nats, context, strict=True):
        scored = own if own is None else own.copy()
        if scored is not None:
            scored[context_bytes(spans, len(scored))] = np.nan
        scored_nats.append(scored)
    return scored_nats


def bits_of(nats: float, scored_bytes: int) -> float:
    """Nats over bytes, in bits per byte.

    >>> round(bits_of(6.931471805599453, 10), 3)
    1.0
    """
    return nats / scored_bytes / NATS_PER_BIT if scored_bytes else float("nan")


def by_domain(domains: Sequence[str], nats: Sequence[np.ndarray | None]) -> dict[str, float]:
    """Bits per byte per domain over the bytes that the model scored, and their plain mean."""
    bits = {}
    for domain in dict.fromkeys(domains):
        arrays = [n for d, n in zip(domains, nats, strict=True) if d == domain and n is not None]
        scored = sum(int(np.isfinite(array).sum()) for array in arrays)
        bits[domain] = bits_of(sum(float(np.nansum(array)) for array in arrays), scored)
    return bits | {"mean": float(np.mean(list(bits.values())))}
