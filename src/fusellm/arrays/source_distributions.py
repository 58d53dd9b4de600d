"""A source's next-token distributions over some texts, in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.read_block import StoredBlock
from fusellm.arrays.tokens import Tokens
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoded, Encoder


def tokens_of_texts(encoded: Sequence[Encoded], usable: np.ndarray | None = None) -> Tokens:
    """Texts as one tokenizer cuts them, one after another.

    Args:
        usable: [texts] bool, those that have tokens; if not given, those that it does not change.
    """
    if usable is None:
        usable = np.array([block.ends is not None for block in encoded], dtype=np.bool_)
    there = [block for block, use in zip(encoded, usable, strict=True) if use]
    nothing = np.zeros(0, dtype=np.int64)
    lengths = [len(b.ids) if use else 0 for b, use in zip(encoded, usable, strict=True)]
    return Tokens(
        offsets_of(np.array(lengths, dtype=np.int64)),
        np.concatenate([nothing, *(block.ids for block in there)]),
        np.concatenate([nothing, *(block.ends for block in there if block.ends is not None)]),
        max([0, *(block.prefix_tokens for block in there)]),
    )


def predicted_of(encoded: Sequence[Encoded], usable: np.ndarray | None = None) -> np.ndarray | None:
    """[T] bool, which tokens of conversations are predicted; None of plain texts.

    Args:
        usable: as `tokens_of_texts` takes it.
    """
    if usable is None:
        usable = np.array([block.ends is not None for block in encoded], dtype=np.bool_)
    there = [block.predicted for block, use in zip(encoded, usable, strict=True) if use]
    own = [one for one in there if one is not None]
    if len(own) < len(there):
        return None
    return np.concatenate([np.zeros(0, dtype=np.bool_), *own])


@dataclass(frozen=True, eq=False)
class SourceDistributions:
    """What a source says comes next, at every token of some texts.

    `len` is the number of texts, and each can be looked at by its number: a `StoredBlock`, whose
    `at(position)` is one distribution.

    Attributes:
        texts: that were read; of conversations what is learnt of each.
        last: of each text, whether it ends a document, and so has EOS.
        encoder: the source's tokenizer.
        tokens: of the texts; those that were not read have none.
        kept: the distributions, at all but each text's last token; of conversations at those before
            what is learnt.
        reasons: why texts were not read, by their numbers.
        conversations: that were read, where the texts are.
        predicted: of conversations [T] bool, which tokens are predicted.
    """

    texts: tuple[str, ...]
    last: tuple[bool, ...]
    encoder: Encoder
    tokens: Tokens
    kept: Kept
    reasons: dict[int, str]
    conversations: tuple[Conversation, ...] | None = None
    predicted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> StoredBlock:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no text {number}: {len(self)} were read")
        number %= len(self)
        tokens = slice(*self.tokens.offsets[number : number + 2])
        positions, places = np.arange(*self.tokens.position_offsets[number : number + 2]), None
        if self.predicted is not None:
            places = np.flatnonzero(self.predicted[tokens]) - 1
            before = int(self.predicted[: tokens.start].sum())
            positions = np.arange(before, before + len(places))
        ids, ends = (column[tokens].copy() for column in (self.tokens.ids, self.tokens.ends))
        kept = self.kept.take(positions)
        reason = self.reasons.get(number)
        return StoredBlock(number, reason is None, reason, ids, ends, kept, places)

    def __iter__(self) -> Iterator[StoredBlock]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} texts, {len(self.kept.tail):,} distributions, "
            f"{len(self.reasons):,} texts not read)"
        )
