"""How a tokenizer spells bytes: which kind it is, told from its parts or by trial.

A tokenizer's tokens are strings, and there are three ways in which they stand for bytes:

    byte-level      one character a byte, in GPT-2's alphabet: "ĠcafÃ©" is " café"
    SentencePiece   text with a mark for a space, and `<0xNN>` for one byte: "▁café" is " café"
    raw bytes       the bytes themselves, or the characters of the same numbers (ByT5, tiktoken)
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from fusellm.errors import TokenizerError

SPACE_MARK = "\u2581"  # ▁, how SentencePiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What a slow tokenizer's kind is tried on. A second one, because its letters tell GPT-2's alphabet
# from plain characters; the first, because some tokenizers know no other letters.
_TRIALS = ("the cat sat on the mat", "Café 中文\n\n  x1")

TextIds = Callable[[Sequence[str]], list[list[int]]]


class TokenKind(StrEnum):
    """How the tokens of a tokenizer stand for bytes."""

    BYTE_LEVEL = "byte-level"
    SPACE_MARKS = "SentencePiece"
    RAW = "raw bytes"


@cache
def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, the other way round (GPT-2).

    >>> byte_alphabet()["Ġ"], byte_alphabet()["A"]
    (32, 65)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass(frozen=True)
class Spelling:
    """How one tokenizer's model spells bytes.

    Attributes:
        kind: see the head of this module.
        mark: what stands for a space; used by `SPACE_MARKS` only.
        has_byte_tokens: whether `<0xNN>` is one byte, and not text.
        without_bytes: tokens that stand for no text, among them the unknown token.

    >>> Spelling(TokenKind.SPACE_MARKS).bytes_of("▁a")
    b' a'
    >>> Spelling(TokenKind.BYTE_LEVEL).bytes_of("ĠÃ©")
    b' \\xc3\\xa9'
    """

    kind: TokenKind
    mark: str = SPACE_MARK
    has_byte_tokens: bool = False
    without_bytes: frozenset[str] = frozenset()

    def bytes_of(self, token: str | bytes) -> bytes | None:
        """The bytes of a token of the model; None where it stands for none."""
        if isinstance(token, bytes):
            return token
        if token in self.without_bytes:
            return None
        if self.kind is TokenKind.BYTE_LEVEL:
            alphabet = byte_alphabet()
            known = all(character in alphabet for character in token)
            return bytes(alphabet[character] for character in token) if known else None
        if self.kind is TokenKind.RAW:
            return token.encode("latin-1") if all(c < "\u0100" for c in token) else None
        if self.is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        if any("\ud800" <= character <= "\udfff" for character in token):
            return None  # halves of a pair, which no text has (CANINE counts them as tokens)
        return token.replace(self.mark, " ").encode()

    def is_byte_token(self, token: str | bytes) -> bool:
        """Whether a token is a `<0xNN>` that stands for one byte.

        >>> Spelling(TokenKind.SPACE_MARKS, has_byte_tokens=True).is_byte_token("<0xGG>")
        False
        """
        return (
            self.has_byte_tokens
            and isinstance(token, str)
            and _BYTE_TOKEN.fullmatch(token) is not None
        )


def read_spelling(
    tokenizer: PreTrainedTokenizerBase, layout: dict[str, Any] | None, text_ids: TextIds
) -> Spelling:
    """Tell how a tokenizer spells bytes.

    Args:
        layout: its tokenizer.json, where it is a fast one.
        text_ids: token ids of texts, without special tokens.

    Raises:
        TokenizerError: in none of the known ways.
    """
    if layout is not None:
        return _of_layout(tokenizer, layout)
    sentencepiece = getattr(tokenizer, "sp_model", None)
    if hasattr(sentencepiece, "IsByte"):
        return _of_sentencepiece(sentencepiece)
    return _by_trial(tokenizer, text_ids)


def layout_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """A fast tokenizer's tokenizer.json; None for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    layout: dict[str, Any] = json.loads(backend.to_str())
    return layout


def _of_layout(tokenizer: PreTrainedTokenizerBase, layout: dict[str, Any]) -> Spelling:
    model = layout["model"]
    reading = [*_components(layout.get("normalizer")), *_components(layout.get("pre_tokenizer"))]
    parts = [*reading, *_components(layout.get("decoder"))]
    types = {part["type"] for part in parts}
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            marks = f"it marks pieces of words with {model[affix]!r}"
            raise _refused(tokenizer, f"{_parts(types)}; {marks}")
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    without_bytes = frozenset([unknown] if unknown else [])
    if any(part["type"] == "ByteLevel" for part in reading):
        return Spelling(TokenKind.BYTE_LEVEL, without_bytes=without_bytes)
    mark = _mark_of(reading)
    if mark is None and "ByteLevel" in types:
        return Spelling(TokenKind.BYTE_LEVEL, without_bytes=without_bytes)
    if mark is not None or {"Metaspace", "ByteFallback"} & types:
        return Spelling(
            TokenKind.SPACE_MARKS,
            mark or SPACE_MARK,
            bool(model.get("byte_fallback")),
            without_bytes,
        )
    raise _refused(tokenizer, _parts(types))


def _parts(types: set[str]) -> str:
    return f"its parts: {', '.join(sorted(types)) or 'none'}"


def _mark_of(reading: list[dict[str, Any]]) -> str | None:
    """What a space becomes on the way to the model, if anything."""
    for part in reading:
        if part["type"] == "Metaspace":
            return str(part.get("replacement", SPACE_MARK))
        if part["type"] == "Replace" and part.get("pattern") == {"String": " "}:
            return str(part["content"])
    return None


def _components(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    if component is None:
        return []
    components = [component]
    for name in ("decoders", "pretokenizers", "normalizers"):
        for inner in component.get(name, ()):
            components += _components(inner)
    return components


def _of_sentencepiece(model: Any) -> Spelling:
    pieces = [model.IdToPiece(id_) for id_ in range(model.GetPieceSize())]
    without = (p for n, p in enumerate(pieces) if model.IsUnknown(n) or model.IsControl(n))
    has_byte_tokens = any(model.IsByte(n) for n in range(len(pieces)))
    return Spelling(TokenKind.SPACE_MARKS, SPACE_MARK, has_byte_tokens, frozenset(without))


def _by_trial(tokenizer: PreTrainedTokenizerBase, text_ids: TextIds) -> Spelling:
    """The kind by which the tokens of most trial texts join to the text."""
    candidates = (
        Spelling(TokenKind.BYTE_LEVEL),
        Spelling(TokenKind.SPACE_MARKS, has_byte_tokens=True),
        Spelling(TokenKind.RAW),
    )
    best, most = candidates[0], 0
    rows = text_ids(_TRIALS)
    for spelling in candidates:
        spelled = [
            b"".join(spelling.bytes_of(token) or b"" for token in _tokens(tokenizer, row))
            for row in rows
        ]
        covered = sum(
            joined in (text.encode(), b" " + text.encode())
            for text, joined in zip(_TRIALS, spelled, strict=True)
        )
        if covered > most:
            best, most = spelling, covered
    if most == 0:
        shown = " ".join(str(token) for token in _tokens(tokenizer, rows[0]))
        raise _refused(tokenizer, f"it spells {_TRIALS[0]!r} as {shown!r}")
    return best


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | bytes]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [token for token in tokens if token is not None]


def _refused(tokenizer: PreTrainedTokenizerBase, why: str) -> TokenizerError:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return TokenizerError(
        f"tokenizer {name!r} is neither byte-level nor SentencePiece-like ({why}), so its tokens "
        "cannot be told as bytes; choose a model with a byte-level or SentencePiece tokenizer"
    )


def shown(token: bytes) -> str:
    """A token's bytes for people: spaces as `·`, and no character that moves the cursor.

    >>> shown(b" return"), shown(b"\\n\\t"), shown(b"\\xc3")
    ('·return', '\\\\n\\\\t', '\\\\xc3')
    """
    text = token.decode("utf-8", "backslashreplace").replace(" ", "·")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
