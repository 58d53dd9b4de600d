"""A source's next-token distributions over some texts, in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.read_block import StoredBlock
from fusellm.arrays.tokens import Tokens
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


@dataclass(frozen=True, eq=False)
class SourceDistributions:
    """What a source says comes next, at every token of some texts.

    `len` is the number of texts, and each can be looked at by its number: a `StoredBlock`, whose
    `at(position)` is one distribution.

    Attributes:
        texts: that were read.
        last: of each text, whether it ends a document, and so has EOS.
        encoder: the source's tokenizer.
        tokens: of the texts; those that were not read have none.
        kept: the distributions, at all but each text's last token.
        reasons: why texts were not read, by their numbers.
    """

    texts: tuple[str, ...]
    last: tuple[bool, ...]
    encoder: Encoder
    tokens: Tokens
    kept: Kept
    reasons: dict[int, str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> StoredBlock:
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no text {number}: {len(self)} were read")
        number %= len(self)
        tokens = slice(*self.tokens.offsets[number : number + 2])
        positions = np.arange(*self.tokens.position_offsets[number : number + 2])
        ids, ends = (column[tokens].copy() for column in (self.tokens.ids, self.tokens.ends))
        kept = self.kept.take(positions)
        reason = self.reasons.get(number)
        return StoredBlock(number, reason is None, reason, ids, ends, kept)

    def __iter__(self) -> Iterator[StoredBlock]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} texts, {len(self.kept.tail):,} distributions, "
            f"{len(self.reasons):,} texts not read)"
        )
