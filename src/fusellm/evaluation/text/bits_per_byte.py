"""A model's bits per byte on somebody's own texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.arrays.given_texts import GivenTexts, Texts
from fusellm.errors import ArgumentError, NumericsError, TokenizerError
from fusellm.evaluation.compare.comparison import RESAMPLINGS
from fusellm.evaluation.text.intervals import Scores, records
from fusellm.evaluation.text.nats import blocks_nats
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.models.adapters import without_adapters
from fusellm.models.heads import left_as_it_was
from fusellm.progress import Progress, Silent
from fusellm.reading.encoded_texts import encoded_for
from fusellm.tokens.encode import Encoded, Encoder


@dataclass(frozen=True, eq=False)
class BitsPerByte:
    """A model's cross-entropy against texts, comparable between tokenizers; lower is better.

    Attributes:
        value: bits per byte over all texts.
        low, high: its 95 % interval over texts; None for fewer than 6 of them.
        by_text: [texts] bits per byte of each; NaN where none of its bytes was predicted.
        scored_bytes: [texts] int64 bytes that were predicted.
    """

    value: float
    low: float | None
    high: float | None
    by_text: np.ndarray
    scored_bytes: np.ndarray

    def __float__(self) -> float:
        return self.value


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: Encoder | PreTrainedTokenizerBase,
    texts: Texts,
    *,
    last: Sequence[bool] | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BitsPerByte:
    """How many bits a model needs for a byte of some texts, each read from its beginning.

    The same text costs the same whatever tokens it is cut into, so that models of different
    tokenizers can be compared. Compare over the same bytes: a model before whose texts nothing is
    put does not predict those of its first token (`scored_bytes`).

    Args:
        model: a causal language model of transformers, where it is to run.
        tokenizer: the model's, of fusellm or of transformers.
        texts: plain; or conversations, as `read_distributions` takes them, of which what the
            assistant says is measured.
        last: of each plain text, whether it ends a document, and so is followed by EOS; all do if
            None.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        seed: of the interval's resamplings.
        progress: is shown how far it is.

    Raises:
        ArgumentError: there is nothing to predict, a text is too long for the model, or the
            tokenizer is another model's.
        NumericsError: the model gives NaN or infinity.
        TokenizerError: the tokenizer changes a text, so that its tokens are not the text's bytes.

    >>> from fusellm import load_pretrained
    >>> model, tokenizer = load_pretrained("zoo/prose", device="cpu")
    >>> found = bits_per_byte(model, tokenizer, ["The function returns a list of strings."])
    >>> round(found.value, 2), found.scored_bytes.tolist()
    (0.88, [39])
    """
    given = GivenTexts.of(texts)
    _, encoded = encoded_for(model, tokenizer, given, last)
    lengths = [len(text.encode()) for text in given.texts]
    for number, (block, length) in enumerate(zip(encoded, lengths, strict=True)):
        if block.ends is None or (block.predicted is not None and _asked(block, length) < length):
            why = f" ({block.reason})" if block.reason else ""
            raise TokenizerError(
                f"the tokenizer changes text {number} ({given.texts[number][:40]!r}…){why}, so "
                "that its tokens are not the text's bytes; leave it out for all models"
            )
    shown = (progress or Silent()).start("measuring", len(given), "texts")
    with left_as_it_was(model), shown as bar:
        model.eval()
        nats = blocks_nats(without_adapters(model), encoded, lengths, batch_tokens, bar.advance)
    rows = [row for row in nats if row is not None]
    scored = np.array([int(np.isfinite(row).sum()) for row in rows], dtype=np.int64)
    sums = np.array([float(np.nansum(row)) for row in rows])
    _require_finite(encoded, lengths, scored)
    if not scored.sum():
        raise ArgumentError("there is nothing to predict: no text has a token after its first")
    scores = Scores(["text"] * len(rows), scored, {"model": sums})
    record = records(scores, RESAMPLINGS, seed)[0]
    each = sums / np.where(scored > 0, scored, np.nan) / NATS_PER_BIT
    return BitsPerByte(record.value, record.low, record.high, each, scored)


def _require_finite(encoded: Sequence[Encoded], lengths: Sequence[int], scored: np.ndarray) -> None:
    """Check that a model has given a number for each byte that it was asked for.

    Raises:
        NumericsError: it has not.
    """
    for number, (block, length) in enumerate(zip(encoded, lengths, strict=True)):
        if scored[number] != _asked(block, length):
            raise NumericsError(
                f"the model gives NaN or infinity in text {number}, so that it has no bits per byte"
            )


def _asked(block: Encoded, length: int) -> int:
    """How many of a text's bytes a model is asked for: all but those of a first token, if any."""
    assert block.ends is not None
    if block.predicted is not None:
        at = np.flatnonzero(block.predicted)
        return int((block.ends[at] - block.ends[at - 1]).sum())
    if len(block.ids) < 2:
        return 0
    return length - int(block.ends[max(block.prefix_tokens, 1) - 1])
