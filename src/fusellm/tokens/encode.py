"""Text to token ids and boundaries, as every model of a run reads a block.

T tokens of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.errors import ArgumentError, TokenizerError
from fusellm.tokens.spelling import shown
from fusellm.tokens.text_ids import rules_of, text_ids_of
from fusellm.tokens.vocabulary import Vocabulary, read_vocabulary
from fusellm.tokens.walk import Walked, all_boundaries, walked


@dataclass(frozen=True)
class Encoded:
    """One block as a model reads it.

    Attributes:
        ids: [T] int64 token ids: the prefix that the tokenizer puts before a text, the text, and
            EOS where the block is its document's last.
        ends: [T] int64 boundaries, in bytes; the prefix has read nothing, EOS the whole block.
            None where the walk failed: the tokenizer changes this text.
        prefix_tokens: how many of them are the prefix, which is read and never predicted.
        predicted: of a conversation [T] bool, which of them are predicted; None of plain text.
        reason: of a conversation that could not be read, why.
        left_out: of a conversation that is longer than its model's context, how many tokens behind
            that are not among the ids.
    """

    ids: np.ndarray
    ends: np.ndarray | None
    prefix_tokens: int = 0
    predicted: np.ndarray | None = None
    reason: str | None = None
    left_out: int = 0


class Encoder:
    """A tokenizer with its tokens as bytes.

    `fusellm.Tokenizer` is one that is loaded by its name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> None:
        """Read a tokenizer's tokens.

        Args:
            rows: of the head of its model. Special tokens beyond them are left out, where there
                are no others: the model neither reads nor predicts them.

        Raises:
            TokenizerError: the tokens cannot be told as bytes, or a token that is put before each
                text is beyond the rows.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ArgumentError(
                f"a tokenizer of transformers is needed, and this is a {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = read_vocabulary(tokenizer)
        beyond = () if rows is None else self.vocabulary.token_bytes[rows:]
        self.is_cut = len(beyond) > 0 and not any(beyond)
        if rows is not None and self.is_cut:
            self._require_prefix_below(rows)
            self.vocabulary = self.vocabulary.below(rows)
        self._text_ids = text_ids_of(tokenizer)

    def _require_prefix_below(self, rows: int) -> None:
        beyond = [id_ for id_ in self.vocabulary.prefix_ids if id_ >= rows]
        if beyond:
            raise TokenizerError(
                f"the tokenizer {self.tokenizer.name_or_path!r} puts {self.spelled(beyond[0])} "
                f"({beyond[0]}) before each text, and its model has {rows} rows in its head; say "
                "what is to be put, as prefix: [], or resize its embeddings"
            )

    @cached_property
    def rules(self) -> str:
        """Tables and rules by which the tokenizer cuts text; equal for those that cut alike."""
        return rules_of(self.tokenizer)

    @property
    def has_dummy_prefix(self) -> bool:
        """Whether the first token of a text may stand for a space that is not there."""
        return self.vocabulary.space_mark

    @property
    def said_around(self) -> tuple[str | None, ...]:
        """What is put around text besides: nothing."""
        return ()

    @property
    def prefix_tokens(self) -> int:
        """How many tokens are put before each text."""
        return len(self.vocabulary.prefix_ids)

    def spelled(self, id_: int) -> str:
        """A token as text: its bytes, or for a special or byte token what its tokenizer writes."""
        known = self.vocabulary.token_bytes
        token = known[id_] if id_ < len(known) else None
        if token is not None and not self.vocabulary.is_fallback[id_]:
            return token.decode("utf-8", "backslashreplace")
        written = self.tokenizer.convert_ids_to_tokens([id_])[0] if id_ < len(known) else None
        return str(written) if written is not None else f"<id {id_}>"

    def shown(self, id_: int) -> str:
        """A token for people: spaces as `·`, and nothing that moves the cursor."""
        return shown(self.spelled(id_).encode("utf-8", "backslashreplace"))

    def bare(self, texts: Sequence[str]) -> tuple[list[list[int]], Walked]:
        """Ids and boundaries of texts, without prefix and EOS: for many short ones."""
        rows = self._text_ids(texts)
        return rows, walked([text.encode() for text in texts], rows, self.vocabulary)

    def encode(self, texts: Sequence[str], last: Sequence[bool] | None = None) -> list[Encoded]:
        """Encode texts.

        Special tokens spelled out in a text are text.

        Args:
            last: whether each text ends a document, and so has EOS; if not given, all do.

        Raises:
            ArgumentError: `texts` is no list of texts, or `last` is of another length.
        """
        require_texts(texts)
        if last is None:
            last = [True] * len(texts)
        if len(last) != len(texts):
            raise ArgumentError(f"last has {len(last)} entries, and there are {len(texts)} texts")
        if not len(texts):
            return []
        rows = self._text_ids(texts)
        data = [text.encode() for text in texts]
        prefix, eos = self.vocabulary.prefix_ids, self.vocabulary.eos_id
        before, encoded = np.zeros(len(prefix), dtype=np.int64), []
        every = all_boundaries(data, rows, self.vocabulary)
        for text, ids, ends, is_last in zip(data, rows, every, last, strict=True):
            after = [eos] if is_last and eos is not None else []
            if ends is not None and (prefix or after):
                ends = np.concatenate([before, ends, np.full(len(after), len(text))])
            whole = np.array([*prefix, *ids, *after], dtype=np.int64)
            encoded.append(Encoded(whole, ends, self.prefix_tokens))
        return encoded


def require_texts(texts: Sequence[str]) -> None:
    """Check that these are texts.

    Raises:
        ArgumentError: it is one text, or something in it is none.
    """
    if isinstance(texts, str):
        raise ArgumentError("this is one text, where a list of texts is needed: give [text]")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(f"text {number} is a {type(text).__name__}, and no str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text {number} has half a character at {error.start} (a lone surrogate), which "
                "has no bytes; leave it out or replace it"
            ) from None


def as_encoder(tokenizer: Encoder | PreTrainedTokenizerBase, rows: int | None = None) -> Encoder:
    """A tokenizer of transformers with its tokens as bytes; one that is that already stays it.

    Args:
        rows: as `Encoder` takes them.

    Raises:
        ArgumentError: it is neither.
        TokenizerError: as `Encoder` does.
    """
    if isinstance(tokenizer, Encoder):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ArgumentError(
            f"a tokenizer is needed, and {tokenizer!r} is a {type(tokenizer).__name__}; give what "
            "fusellm.Tokenizer.from_pretrained or transformers' AutoTokenizer gives"
        )
    return _encoder_of(tokenizer, len(tokenizer), rows)


@lru_cache(maxsize=8)
def _encoder_of(tokenizer: PreTrainedTokenizerBase, tokens: int, rows: int | None) -> Encoder:
    """Made once for a tokenizer that is given again and again, unless tokens were added to it."""
    return Encoder(tokenizer, rows)
