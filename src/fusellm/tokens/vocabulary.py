"""What bytes each token id stands for.

V vocabulary size: one more than the highest id that has a token. Ids below it without a token, as
the rows of a padded head above it, never have bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.errors import TokenizerError
from fusellm.tokens.spelling import (
    SPACE_MARK,
    Spelling,
    TextIds,
    TokenKind,
    byte_alphabet,
    layout_of,
    read_spelling,
)
from fusellm.tokens.text_ids import text_ids_of

__all__ = ["SPACE_MARK", "TokenKind", "Vocabulary", "byte_alphabet", "read_vocabulary"]

# One that the tokenizer knows shows where it puts a dummy prefix.
_PROBES = ("a", "e", "A", "1", ".", "\u4e2d")

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _nowhere() -> np.ndarray:
    return np.zeros(0, dtype=np.bool_)


@dataclass(frozen=True)
class Vocabulary:
    """Every token id of one tokenizer as bytes.

    Attributes:
        token_bytes: [V] the bytes of each token; None for special tokens and for ids without one.
        space_mark: whether a token's leading space may be a dummy prefix.
        eos_id: id of the end-of-sequence token, if there is one.
        prefix_ids: ids of the tokens that this tokenizer puts before every text by default: none,
            BOS, or whatever its model was trained with (GLM's `[gMASK] <sop>`).
        is_fallback: [V] whether the token is a `<0xNN>` byte of SentencePiece.
        kind: how the tokens are spelled.
        doubles: whether the dummy prefix comes even before a space ("▁▁a" for " a").
        restarts: [V] whether the text after this token is begun anew, with a dummy prefix of its
            own; empty where no token does that.
        is_added: [V] whether the token is an added one that stands for its content and never for
            a dummy prefix; empty where there is none.
    """

    token_bytes: tuple[bytes | None, ...]
    space_mark: bool
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    is_fallback: np.ndarray
    kind: TokenKind = TokenKind.SPACE_MARKS
    doubles: bool = False
    restarts: np.ndarray = field(default_factory=_nowhere)
    is_added: np.ndarray = field(default_factory=_nowhere)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[V] int64, bytes of each token; 0 for those without."""
        return np.array([len(token or b"") for token in self.token_bytes], dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """[V] int64, where each token begins in `flat`."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    @cached_property
    def flat(self) -> np.ndarray:
        """uint8, all tokens' bytes one after another."""
        return np.frombuffer(b"".join(token or b"" for token in self.token_bytes), dtype=np.uint8)

    @cached_property
    def is_text(self) -> np.ndarray:
        """[V] bool, whether the id is a token that stands for text."""
        return np.array([token is not None for token in self.token_bytes])

    @cached_property
    def may_be_dummy(self) -> np.ndarray:
        """[V] bool, whether the token begins with a space mark that may stand for no space."""
        begins = np.array([(token or b"").startswith(b" ") for token in self.token_bytes])
        own = ~self.is_added if len(self.is_added) else True
        return np.asarray(begins & self.space_mark & ~self.is_fallback & own)

    @cached_property
    def restarts_after(self) -> np.ndarray:
        """[V] bool, `restarts` at its full length."""
        none = np.zeros(len(self.token_bytes), dtype=np.bool_)
        return self.restarts if len(self.restarts) else none

    def __len__(self) -> int:
        return len(self.token_bytes)

    def below(self, rows: int) -> "Vocabulary":
        """The same without the ids from `rows` on, which must stand for no text."""
        assert not any(self.token_bytes[rows:])
        return replace(
            self,
            token_bytes=self.token_bytes[:rows],
            is_fallback=self.is_fallback[:rows],
            restarts=self.restarts[:rows],
            is_added=self.is_added[:rows],
        )


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Tell a tokenizer's tokens as bytes.

    Fast tokenizers and those written in Python; byte-level, SentencePiece-like, or raw bytes.

    Raises:
        TokenizerError: the tokenizer spells its tokens in another way, such as WordPiece, or what
            it puts before a text is not to be told.
    """
    text_ids, layout = text_ids_of(tokenizer), layout_of(tokenizer)
    spelling = read_spelling(tokenizer, layout, text_ids)
    added = {int(id_): token for id_, token in tokenizer.added_tokens_decoder.items()}
    own = _own_ids(tokenizer, layout)
    size = max([*own, *added], default=-1) + 1
    special = {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}
    special -= _special_bytes(tokenizer, spelling, special & own)
    token_bytes: list[bytes | None] = [None] * size
    is_fallback, is_added, restarts = (np.zeros(size, dtype=np.bool_) for _ in range(3))
    for id_ in sorted({*own, *added} - special):
        token = _token(tokenizer, id_) if id_ in own else None
        if id_ in added and not (token and _is_marked(spelling, added[id_].content)):
            in_normalized = layout is not None and added[id_].normalized
            takes_mark = in_normalized and _takes_mark(tokenizer, spelling, added[id_].content)
            token_bytes[id_] = b" " * takes_mark + added[id_].content.encode()
            is_added[id_] = not takes_mark
            # Dummy prefixes are put before tokens are found in normalized text, and not again.
            restarts[id_] = not in_normalized
        elif token is not None:
            token_bytes[id_] = spelling.bytes_of(token)
            is_fallback[id_] = spelling.is_byte_token(token)
    space_mark, doubles = _dummy_prefix(spelling, text_ids, token_bytes)
    return Vocabulary(
        tuple(token_bytes),
        space_mark,
        tokenizer.eos_token_id,
        _prefix(tokenizer, text_ids),
        is_fallback,
        spelling.kind,
        doubles,
        restarts,
        is_added,
    )


def _own_ids(tokenizer: PreTrainedTokenizerBase, layout: dict[str, Any] | None) -> set[int]:
    """Ids that the model itself has; some of them may be added tokens as well."""
    if layout is None:
        return set(range(max(tokenizer.vocab_size, len(tokenizer))))
    vocabulary = layout["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {int(id_) for id_ in vocabulary.values()}
    return set(range(len(vocabulary)))


def _special_bytes(
    tokenizer: PreTrainedTokenizerBase, spelling: Spelling, special: Iterable[int]
) -> set[int]:
    """Those `<0xNN>` that are flagged special, and that the model cuts text into all the same.

    Not one that has a role as well, such as EOS: what it stands for is that.
    """
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    by_name = {id_: _token(tokenizer, id_) for id_ in set(special) - roles}
    tokens = {id_: token for id_, token in by_name.items() if token is not None}
    return {
        id_
        for id_, token in tokens.items()
        if spelling.is_byte_token(token) and tokenizer.decode([id_]) != token
    }


def _token(tokenizer: PreTrainedTokenizerBase, id_: int) -> str | bytes | None:
    try:
        token: str | bytes | None = tokenizer.convert_ids_to_tokens([id_])[0]
    except (IndexError, KeyError, ValueError):  # tokenizers in Python, at ids between their tables
        return None
    return token


def _is_marked(spelling: Spelling, content: str) -> bool:
    """Whether an added token of these characters, as the model's own, stands for other bytes.

    Gemma lists "▁▁" as added, though its model emits it for two spaces.
    """
    return spelling.kind is TokenKind.SPACE_MARKS and spelling.bytes_of(content) != content.encode()


def _takes_mark(tokenizer: PreTrainedTokenizerBase, spelling: Spelling, content: str) -> bool:
    """Whether an added token is looked for with a mark before it, as what it says is normalized.

    That is so where the normalizer prepends the dummy prefix: "<b>" becomes "▁<b>", which stands
    for " <b>", or at the beginning of a text for "<b>".
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or spelling.kind is not TokenKind.SPACE_MARKS:
        return False
    marked: str = normalizer.normalize_str(content)
    return marked == spelling.mark + content


def _dummy_prefix(
    spelling: Spelling, text_ids: TextIds, token_bytes: Sequence[bytes | None]
) -> tuple[bool, bool]:
    """(whether a text gets a dummy prefix, whether one that begins with a space gets it too)."""

    def spelled(text: str) -> bytes | None:
        tokens = [token_bytes[id_] for id_ in text_ids([text])[0]]
        known = [token for token in tokens if token is not None]
        return b"".join(known) if len(known) == len(tokens) else None

    for probe in _PROBES:
        data = probe.encode()
        alone = spelled(probe)
        if alone is not None and alone.endswith(data):
            # One that puts a mark before every word also spells " a" as "▁" "▁a"; but then the
            # first mark is the text's, and "a a" has two in its middle.
            is_doubled = spelled(" " + probe) == b"  " + data
            is_once = spelled(f"{probe} {probe}") == b" " + data + b" " + data
            return alone == b" " + data, is_doubled and is_once
    return spelling.kind is TokenKind.SPACE_MARKS, False


def _prefix(tokenizer: PreTrainedTokenizerBase, text_ids: TextIds) -> tuple[int, ...]:
    """The tokens that stand before a text where special tokens are put.

    What stands after it is left alone: EOS is put where a document ends, and nowhere else.
    """
    for probe in _PROBES:
        whole = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        own = text_ids([probe])[0]
        for at in range(len(whole) - len(own) + 1):
            if own and whole[at : at + len(own)] == own:
                return tuple(whole[:at])
    name = tokenizer.name_or_path or type(tokenizer).__name__
    raise TokenizerError(
        f"what the tokenizer {name!r} puts before a text is not to be told: with special tokens it "
        f"cuts {_PROBES[0]!r} otherwise than without; say it in the recipe, as prefix: [TOKEN, …]"
    )
