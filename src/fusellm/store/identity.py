"""What a stage's folder was made from, and how two of them differ."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusellm.tokens.encode import Encoder


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_fingerprint(encoder: "Encoder") -> str:
    """Digest of how a tokenizer cuts text and of what it puts before and after it."""
    vocabulary, prefix = encoder.vocabulary, list(encoder.vocabulary.prefix_ids)
    # One token or none stands by itself, as in the stores of the time that knew BOS alone.
    before = prefix if len(prefix) > 1 else next(iter(prefix), None)
    parts: list[Any] = [encoder.rules, [before, vocabulary.eos_id]]
    if encoder.said_around:
        parts.append({"around": encoder.said_around})
    return digest([*parts, len(vocabulary)] if encoder.is_cut else parts)


@dataclass(frozen=True)
class Identity:
    """What a stage's folder was made from. Two runs of equal identity give equal folders.

    Attributes:
        stage: name of the stage, with the source's where it has one.
        settings: the recipe's keys that the stage reads.
        inputs: fingerprints of everything that it read: weights, tokenizers, earlier stages.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    def differences(self, other: "Identity") -> list[str]:
        """What differs, each as `key: other's value here, own value there`."""
        differences = []
        for kind, own, others in (
            ("", _flat(self.settings), _flat(other.settings)),
            ("input ", self.inputs, other.inputs),
        ):
            for key in sorted(own.keys() | others.keys()):
                if own.get(key) != others.get(key):
                    had, wanted = _short(others.get(key)), _short(own.get(key))
                    if kind and key.startswith("documents."):  # files, by name and content
                        differences.append(f"what corpus.{key} holds was {had} and is now {wanted}")
                        continue
                    differences.append(f"{kind}{key} was {had} and is now {wanted}")
        return differences


def _flat(value: Any, before: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys, as --set names them.

    A key that is a word of Python has an underscore in our classes, and none in a recipe.
    """
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return {before: value}
    flat: dict[str, Any] = {}
    for key, inner in pairs:
        step = str(key).removesuffix("_")
        flat |= _flat(inner, f"{before}.{step}" if before else step)
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64:
        return value[:12] + "…"
    return text if len(text) <= 80 else text[:77] + "…"
