"""Text in scripts that are not Latin, and emoji, made from Python's table of characters.

No language: each script has some hundred words of its letters, of which a few are frequent, and
each word comes again and again. Half of the documents tell the characters' names beside them.
"""

import random
import unicodedata
from functools import cache

_SCRIPTS = {
    "GREEK SMALL LETTER": (0x370, 0x3FF),
    "CYRILLIC SMALL LETTER": (0x400, 0x45F),
    "HEBREW LETTER": (0x5D0, 0x5EA),
    "ARABIC LETTER": (0x620, 0x64A),
    "DEVANAGARI": (0x904, 0x94D),
    "THAI CHARACTER": (0xE01, 0xE45),
    "HIRAGANA LETTER": (0x3041, 0x3096),
    "KATAKANA LETTER": (0x30A1, 0x30FA),
    "HANGUL SYLLABLE": (0xAC00, 0xAF00),
    "CJK UNIFIED IDEOGRAPH": (0x4E00, 0x4FFF),
}
_EMOJI = (0x1F300, 0x1F64F)
_WORDS = 150


@cache
def _letters(prefix: str) -> tuple[str, ...]:
    """Of a script; those that Unicode writes otherwise once it is normalized are left out."""
    begin, end = _SCRIPTS[prefix]
    every = (chr(code) for code in range(begin, end + 1))
    return tuple(
        letter
        for letter in every
        if unicodedata.name(letter, "").startswith(prefix)
        and unicodedata.normalize("NFKC", letter) == letter
    )


def script_documents(seed: int, count: int) -> list[str]:
    """So many documents of some 600 bytes, each of one script.

    >>> script_documents(0, 2) == script_documents(0, 2)
    True
    """
    chance = random.Random(seed)
    prefixes = list(_SCRIPTS)
    return [
        (_chart if n % 2 else _sentences)(chance, prefixes[n // 2 % len(prefixes)])
        for n in range(count)
    ]


def _emoji(chance: random.Random) -> str:
    while True:
        found = chr(chance.randint(*_EMOJI))
        if unicodedata.name(found, ""):
            return found


def _sentences(chance: random.Random, prefix: str) -> str:
    letters = _letters(prefix)
    own = random.Random(prefix)  # the same words in each document of a script
    longest = 3 if prefix.startswith("CJK") else 8
    words = ["".join(own.choices(letters, k=own.randint(1, longest))) for _ in range(_WORDS)]
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    lines, size = [], 0
    while size < 600:
        line = " ".join(chance.choices(words, weights, k=chance.randint(3, 10)))
        line += chance.choice((".", ",", "!", " " + _emoji(chance), _emoji(chance) * 2))
        size += len(line.encode())
        lines.append(unicodedata.normalize("NFC", line))
    return "\n".join(lines) + "\n"


def _chart(chance: random.Random, prefix: str) -> str:
    lines = []
    for _ in range(14):
        character = chance.choice((chance.choice(_letters(prefix)), _emoji(chance)))
        lines.append(f"{character}  {unicodedata.name(character).lower()}, U+{ord(character):04X}")
    return "\n".join(lines) + "\n"
