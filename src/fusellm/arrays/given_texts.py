"""Texts as a program gives them: plain, or conversations, which models read by chat templates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.arrays.ragged import Ragged
from fusellm.arrays.spans import Spans
from fusellm.arrays.tokens import Tokens
from fusellm.errors import ArgumentError
from fusellm.tokens.chat import ChatEncoder, own_template
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoded, Encoder, as_encoder, require_texts

Texts = Sequence[str] | Sequence[Conversation] | Sequence[Sequence[Mapping[str, Any]]]
"""Plain texts; or conversations, or the messages of each as OpenAI has them."""


@dataclass(frozen=True)
class GivenTexts:
    """Texts, all of one kind.

    Attributes:
        texts: of each what is learnt: all of a plain text, of a conversation what the assistant
            says.
        conversations: where they are.
    """

    texts: tuple[str, ...]
    conversations: tuple[Conversation, ...] | None = None

    @classmethod
    def of(cls, given: "Texts | GivenTexts") -> "GivenTexts":
        """What was given.

        Raises:
            ArgumentError: it is no list of texts, or of conversations.

        >>> said = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
        >>> GivenTexts.of([said]).texts, GivenTexts.of(["Two."]).texts
        (('2',), ('Two.',))
        """
        if isinstance(given, GivenTexts):
            return given
        if isinstance(given, str | Mapping | Conversation):
            raise ArgumentError("this is one text, where a list of texts is needed: give [text]")
        if len(given) == 0 or isinstance(given[0], str):
            plain: Any = given
            require_texts(plain)
            return cls(tuple(plain))
        conversations = tuple(_conversations(given))
        return cls(tuple(one.text for one in conversations), conversations)

    def __len__(self) -> int:
        return len(self.texts)

    def encoder(
        self, tokenizer: Encoder | PreTrainedTokenizerBase, rows: int | None = None
    ) -> Encoder:
        """A tokenizer that reads them; conversations by the chat template that it has.

        Raises:
            ArgumentError, TokenizerError: as `as_encoder` and `ChatEncoder` do; or one that reads
                conversations is to read plain text.
        """
        if self.conversations is None:
            encoder = as_encoder(tokenizer, rows)
            if isinstance(encoder, ChatEncoder):
                raise ArgumentError(
                    "this tokenizer reads conversations, and plain texts are given; give the "
                    "tokenizer without its template, or messages"
                )
            return encoder
        if isinstance(tokenizer, ChatEncoder):
            return tokenizer
        encoder = as_encoder(tokenizer, rows)
        own = encoder.tokenizer
        known = len(own), rows or len(encoder.vocabulary), own_template(own)
        return _chat_encoder_of(own, *known)

    def encode(self, encoder: Encoder, last: Sequence[bool] | None = None) -> list[Encoded]:
        """Their tokens.

        Args:
            encoder: as `encoder` gives it.
            last: of each plain text, whether it ends a document; all do if None.

        Raises:
            ArgumentError: `last` is of another length, or there are conversations.
        """
        if self.conversations is None:
            return encoder.encode(self.texts, last)
        if last is not None:
            raise ArgumentError("last is of plain texts; of conversations each answer ends a turn")
        assert isinstance(encoder, ChatEncoder)
        return encoder.encode_conversations(self.conversations)

    @property
    def byte_offsets(self) -> np.ndarray:
        """Where the bytes of each text that is fused by itself are; of a conversation each answer.

        See `fused_apart`.
        """
        if self.conversations is None:
            lengths = [len(text.encode()) for text in self.texts]
            return np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        return self._spans.byte_offsets

    @property
    def text_of_each(self) -> np.ndarray:
        """The number of the text that each of them is of."""
        return np.arange(len(self)) if self.conversations is None else self._spans.block

    def fused_apart(self, tokens: Tokens, predicted: np.ndarray | None) -> Tokens:
        """The tokens of what is fused by itself: a plain text, or an answer.

        Args:
            tokens: of the texts.
            predicted: of conversations, as `source_distributions.predicted_of` gives it.
        """
        if self.conversations is None:
            return tokens
        assert predicted is not None
        return self._spans.tokens(tokens, predicted)

    @property
    def _spans(self) -> Spans:
        assert self.conversations is not None
        ends = [np.array(one.span_ends, dtype=np.int64) for one in self.conversations]
        return Spans.of(Ragged.of(ends))


@lru_cache(maxsize=8)
def _chat_encoder_of(
    tokenizer: PreTrainedTokenizerBase, tokens: int, rows: int, template: str | None
) -> ChatEncoder:
    """Made once for a tokenizer that is given again and again, unless it was changed since."""
    return ChatEncoder(tokenizer, rows, template)


def _conversations(given: Sequence[Any]) -> Iterator[Conversation]:
    for number, one in enumerate(given):
        if isinstance(one, Conversation):
            try:
                one.to_json().encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise ArgumentError(f"conversation {number} has what is no text: {error}") from None
            yield one
            continue
        if isinstance(one, str) or not isinstance(one, Sequence):
            raise ArgumentError(
                f"text {number} is a {type(one).__name__}, where others are conversations; give "
                "one kind: texts, or lists of messages"
            )
        try:
            yield Conversation.of(one)
        except ArgumentError as error:
            raise ArgumentError(f"conversation {number}: {error}") from None
