"""Kinds of text, by which figures are told apart.

Each character is of one kind; a token is of the last kind in this list that any of its characters
has:

    white space   Unicode's, a line end too
    punctuation   what is none of the others
    words         letters of the Latin script
    identifiers   letters and `_` of a run of letters, digits and `_` that has a `_`, a digit, or a
                  capital after a small letter; or has `.`, `::`, `->`, `@`, `$` or `#` right before
                  it, or `(`, `[`, `::`, `->` or a `.` with a letter after it right behind it
    non-Latin     letters and marks of other scripts, and their digits
    emoji         U+2600 to U+27BF, U+1F000 to U+1FAFF, joiners and variation selectors
    digits        0 to 9

A token that ends within a character is of that character's kind.
"""

import re
import unicodedata
from enum import IntEnum
from functools import lru_cache

import numpy as np

_RUN = re.compile(r"[A-Za-z0-9_]+")
_INNER = re.compile(r"_|[a-z][A-Z]|[A-Za-z]\d|\d[A-Za-z]")
_BEFORE = re.compile(r"(?:\.|::|->|[@$#])$")
_BEHIND = re.compile(r"[(\[]|::|->|\.[A-Za-z_]")
_LATIN = ("LATIN ", "COMBINING ", "MODIFIER ", "FEMININE ", "MASCULINE ", "MICRO ")
_JOINERS = {0x200D, 0xFE0E, 0xFE0F}


class Kind(IntEnum):
    """Of a character, and of a token that has it and none of a later kind."""

    WHITE_SPACE = 0
    PUNCTUATION = 1
    WORDS = 2
    IDENTIFIERS = 3
    NON_LATIN = 4
    EMOJI = 5
    DIGITS = 6

    @property
    def label(self) -> str:
        """As figures are called."""
        return self.name.lower()


@lru_cache(maxsize=1 << 16)
def kind_of_character(character: str) -> Kind:
    """The kind of a character alone; a letter of a run may be an identifier's.

    >>> [kind_of_character(c).name for c in "7 é;"]
    ['DIGITS', 'WHITE_SPACE', 'WORDS', 'PUNCTUATION']
    >>> [kind_of_character(c).name for c in "λ語\\u0967\\U0001f600"]
    ['NON_LATIN', 'NON_LATIN', 'NON_LATIN', 'EMOJI']
    """
    code = ord(character)
    if "0" <= character <= "9":
        return Kind.DIGITS
    if 0x2600 <= code <= 0x27BF or 0x1F000 <= code <= 0x1FAFF or code in _JOINERS:
        return Kind.EMOJI
    if character.isspace():
        return Kind.WHITE_SPACE
    category = unicodedata.category(character)
    if category[0] in "LM" or category == "Nd":
        latin = unicodedata.name(character, "").startswith(_LATIN)
        return Kind.WORDS if latin else Kind.NON_LATIN
    return Kind.PUNCTUATION


def kinds_of_characters(text: str) -> np.ndarray:
    """[characters] int8 of `Kind`.

    >>> kinds_of_characters("a my_x f(").tolist()
    [2, 0, 3, 3, 3, 3, 0, 3, 1]
    >>> kinds_of_characters("Name. It").tolist()
    [2, 2, 2, 2, 1, 0, 2, 2]
    """
    kinds = np.array([kind_of_character(character) for character in text], dtype=np.int8)
    for run in _RUN.finditer(text):
        begin, end = run.span()
        named = (
            _INNER.search(run.group())
            or _BEFORE.search(text[max(0, begin - 2) : begin])
            or _BEHIND.match(text, end)
        )
        if named:
            mine = kinds[begin:end]
            mine[mine < Kind.IDENTIFIERS] = Kind.IDENTIFIERS
    return kinds


def kinds_of_spans(text: str, spans: np.ndarray) -> np.ndarray:
    """[N] int8 of `Kind`, of spans [N, 2] of a text's UTF-8 bytes, none of them empty.

    >>> kinds_of_spans("x = 12;\\n", np.array([[0, 1], [1, 3], [3, 6], [6, 8], [7, 8]])).tolist()
    [2, 1, 6, 1, 0]
    >>> kinds_of_spans("λ", np.array([[0, 1]])).tolist()
    [4]
    """
    lengths = [len(character.encode()) for character in text]
    by_byte = np.repeat(kinds_of_characters(text), lengths)
    return np.array([by_byte[begin:end].max() for begin, end in spans.tolist()], dtype=np.int8)
