"""What bytes each token id stands for.

V vocabulary size, including the rows of a padded head that no token has.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.errors import TokenizerError

SPACE_MARK = "\u2581"  # ▁, how SentencePiece writes a space


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
class Vocabulary:
    """Every token id of one tokenizer as bytes.

    Attributes:
        token_bytes: [V] the bytes of each token; None for special tokens and for ids without one.
        space_mark: whether a token's leading space may be a dummy prefix (SentencePiece).
        eos_id: id of the end-of-sequence token, if there is one.
        bos_id: id of the token that this tokenizer puts before every text by default, if any.
        is_fallback: [V] whether the token is a `<0xNN>` byte of SentencePiece.
    """

    token_bytes: tuple[bytes | None, ...]
    space_mark: bool
    eos_id: int | None
    bos_id: int | None
    is_fallback: np.ndarray

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
        begins = [(token or b"").startswith(b" ") for token in self.token_bytes]
        return np.asarray(np.array(begins) & self.space_mark & ~self.is_fallback)

    def __len__(self) -> int:
        return len(self.token_bytes)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Tell a tokenizer's tokens as bytes.

    Raises:
        TokenizerError: the tokenizer is neither byte-level nor SentencePiece with space marks.
    """
    byte_level, space_mark = _kind(tokenizer)
    alphabet = byte_alphabet()
    added = {int(id_): token for id_, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids)
    token_bytes: list[bytes | None] = []
    is_fallback = np.zeros(len(tokenizer), dtype=np.bool_)
    spellings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for id_, spelling in enumerate(spellings):
        if id_ in special or spelling is None or (id_ in added and added[id_].special):
            token_bytes.append(None)
        elif id_ in added:
            token_bytes.append(added[id_].content.encode())
        elif byte_level:
            known = all(character in alphabet for character in spelling)
            token_bytes.append(bytes(alphabet[c] for c in spelling) if known else None)
        elif len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            token_bytes.append(bytes([int(spelling[3:5], 16)]))
            is_fallback[id_] = True
        else:
            token_bytes.append(spelling.replace(SPACE_MARK, " ").encode())
    return Vocabulary(
        tuple(token_bytes), space_mark, tokenizer.eos_token_id, _default_bos(tokenizer), is_fallback
    )


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if bos is not None and ids[:1] == [bos] else None


def _kind(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no fast "
            "version, which fusellm needs; convert it with transformers' AutoTokenizer("
            "use_fast=True) and save it"
        )
    layout: dict[str, Any] = json.loads(backend.to_str())
    parts = _component_types(layout.get("decoder")) | _component_types(layout.get("pre_tokenizer"))
    if "ByteLevel" in parts:
        return True, False
    if "Metaspace" in parts or "ByteFallback" in parts:
        return False, True
    raise TokenizerError(
        f"tokenizer {tokenizer.name_or_path!r} is neither byte-level nor SentencePiece-like (its "
        f"parts: {', '.join(sorted(parts)) or 'none'}), so its tokens cannot be told as bytes; "
        "choose a model with a byte-level or SentencePiece tokenizer"
    )


def _component_types(component: dict[str, Any] | None) -> set[str]:
    if component is None:
        return set()
    found = {component["type"]}
    for name in ("decoders", "pretokenizers", "normalizers"):
        for inner in component.get(name, ()):
            found |= _component_types(inner)
    return found
