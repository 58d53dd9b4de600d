"""Text to token ids where nothing that a text says is a special token.

Corpus text is data: `</s>` written in it is text. Added tokens that are not special stand for
their content and are found, as transformers finds them.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from fusellm.errors import TokenizerError
from fusellm.tokens.spelling import TextIds

# What decides, beside the vocabulary, how tokenizers written in Python cut text.
_TABLES_OF_SLOW_TOKENIZERS = ("bpe_ranks", "merges", "pat", "byte_encoder")


def text_ids_of(tokenizer: PreTrainedTokenizerBase) -> TextIds:
    """The function from texts to token ids, special tokens switched off.

    Raises:
        TokenizerError: the tokenizer is neither a fast one nor one written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if type(tokenizer)._encode_plus is TokenizersBackend._encode_plus:
            return lambda texts: _backend_ids(backend, list(texts))
        return lambda texts: _ids(tokenizer, list(texts)) if texts else []
    if isinstance(tokenizer, PreTrainedTokenizer):
        return _SlowTextIds(tokenizer)
    raise TokenizerError(
        f"tokenizer {tokenizer.name_or_path!r} is a {type(tokenizer).__name__}, which does not say "
        "how it spells its tokens; save it as a tokenizer.json (save_pretrained of a fast "
        "tokenizer) and give that folder"
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return rows


def _backend_ids(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    """As `_ids`, without what transformers makes of each text besides: a quarter of the time.

    It changes the same settings of the backend as a call of the tokenizer does.
    """
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = True
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


class _SlowTextIds:
    """A tokenizer in Python: with special tokens off, transformers finds no added token either."""

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token.content: (id_, token)
            for id_, token in tokenizer.added_tokens_decoder.items()
            if not token.special and token.content not in tokenizer.all_special_tokens
        }
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._added:
            return [self._between(text) for text in texts]
        return [[id_ for piece in self._pieces(text) for id_ in self._of(piece)] for text in texts]

    def _of(self, piece: str) -> list[int]:
        return [self._added[piece][0]] if piece in self._added else self._between(piece)

    def _between(self, text: str) -> list[int]:
        return _ids(self._tokenizer, [text])[0] if text else []

    def _pieces(self, text: str) -> list[str]:
        """Added tokens and what is between them, with the flags that transformers heeds."""
        pieces = self._cut.split(text)  # added tokens stand at the odd places
        for at in range(1, len(pieces), 2):
            token = self._added[pieces[at]][1]
            left, right = pieces[at - 1], pieces[at + 1]
            if token.rstrip:
                pieces[at + 1] = right.lstrip()
            if token.lstrip:
                pieces[at - 1] = left.rstrip()
        return pieces


def rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides how a tokenizer cuts text; equal for tokenizers that cut alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.truncation is not None or backend.padding is not None:
            backend = Tokenizer.from_str(backend.to_str())  # of somebody's last call: no rule
            backend.no_truncation()
            backend.no_padding()
        return str(backend.to_str())
    model: Any = getattr(tokenizer, "sp_model", None)
    proto = model.serialized_model_proto() if hasattr(model, "serialized_model_proto") else b""
    settings = {k: v for k, v in tokenizer.init_kwargs.items() if not _is_place(k)}
    return json.dumps(
        {
            "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            "sentencepiece": hashlib.sha256(proto).hexdigest(),
            "vocabulary": sorted((id_, str(token)) for token, id_ in tokenizer.get_vocab().items()),
            "added": [repr(token) for token in tokenizer.added_tokens_decoder.items()],
            "tables": [repr(getattr(tokenizer, n, None)) for n in _TABLES_OF_SLOW_TOKENIZERS],
            "settings": {key: repr(settings[key]) for key in sorted(settings)},
        },
        ensure_ascii=False,
    )


def _is_place(setting: str) -> bool:
    return setting == "name_or_path" or setting.endswith("_file")
