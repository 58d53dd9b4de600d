"""What of a block is looked at: all of it, or of a conversation one answer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusellm.arrays.distributions import Kept
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import Ragged
from fusellm.arrays.spans import Spans
from fusellm.arrays.tokens import Tokens
from fusellm.errors import StoreError
from fusellm.store.blocks import Block
from fusellm.store.externalized import PREDICTED, kept_of, tokens_of
from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Looked:
    """What is looked at: a block, or of a conversation an answer as if it were one.

    Attributes:
        block: its text is the answer's.
        number: of the answer, from 0; None of plain text.
        spans: of the conversation.
    """

    block: Block
    number: int | None = None
    spans: Spans | None = None

    @classmethod
    def of(cls, block: Block, number: int | None) -> "Looked":
        """Raises StoreError where there is no such answer."""
        told = block.conversation
        if told is None:
            if number is not None:
                raise StoreError(f"block {block.number} is plain text and has no answers")
            return cls(block)
        ends = np.array(told.span_ends)
        chosen = 0 if number is None else number
        if not 0 <= chosen < len(ends):
            raise StoreError(
                f"there is no answer {chosen}: {len(ends)} of block {block.number} are learnt, "
                f"from 0 to {len(ends) - 1}"
            )
        said = told.messages[told.learnt[chosen]]["content"]
        return cls(
            replace(block, text=said), chosen, Spans.of(Ragged(np.array([0, len(ends)]), ends))
        )

    @property
    def answers(self) -> int:
        """How many there are."""
        return 0 if self.spans is None else len(self.spans.block)

    def _all(self, columns: Mapping[str, Any], prefix_tokens: int = 1) -> Tokens:
        of_block = tokens_of(columns, prefix_tokens)
        if self.spans is None:
            return of_block
        return self.spans.tokens(of_block, columns[PREDICTED].values)

    def tokens(self, columns: Mapping[str, Any], prefix_tokens: int) -> Tokens:
        """A model's tokens of it."""
        every = self._all(columns, prefix_tokens)
        if self.number is None:
            return every
        start, end = every.offsets[self.number : self.number + 2]
        own = slice(start, end)
        return Tokens(np.array([0, end - start]), every.ids[own], every.ends[own], 1)

    def kept(self, columns: Mapping[str, Any]) -> Kept:
        """A source's distributions of it."""
        every = kept_of(columns)
        if self.number is None:
            return every
        positions = self._all(columns).position_offsets[self.number : self.number + 2]
        return every.take(np.arange(*positions))

    def fused(self, stored: Fused, columns: Mapping[str, Any], positions: int) -> Fused:
        """Its fused distributions, of those of a block at all but its last token."""
        if self.number is None:  # one that the target could not read has positions all the same
            return stored.between(0, positions)
        if not positions:
            return stored.between(0, 0)
        first = self.first_position(columns)
        return stored.between(first, first + positions)

    def first_position(self, columns: Mapping[str, Any]) -> int:
        """The number of its first position among all of the block, 0 where it has none."""
        if self.number is None:
            return 0
        asked = np.flatnonzero(columns[PREDICTED].values) - 1
        first = int(self._all(columns).position_offsets[self.number])
        return int(asked[first]) if first < len(asked) else 0

    def asked(self, columns: Mapping[str, Any], encoder: Encoder) -> str:
        """What a model has read since the answer before, as its tokenizer writes it."""
        predicted, ids = columns[PREDICTED].values, columns["ids"].values
        first = int(self._all(columns).position_offsets[self.number or 0])
        asked = np.flatnonzero(predicted)
        if first >= len(asked):
            return ""
        end = int(asked[first])
        start = int(asked[first - 1]) + 1 if first else 0
        return "".join(encoder.spelled(int(id_)) for id_ in ids[start:end])
