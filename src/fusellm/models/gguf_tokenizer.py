"""The tokenizer that a GGUF file holds, as a fast tokenizer of transformers.

Two kinds can be built from what a file says: byte-level BPE with a known word for its
pre-tokenization, and SentencePiece's BPE. Any other needs the original beside the file.
"""

from enum import IntEnum

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from fusellm.errors import ModelError
from fusellm.models.gguf import GgufHeader
from fusellm.models.gguf_rules import RULES
from fusellm.tokens.spelling import SPACE_MARK

CHAT_TEMPLATE = "tokenizer.chat_template"
_CURE = (
    "put the model's own tokenizer beside it, as `tokenizer:` with a folder or a hub name (the "
    "repository that the file was made from has one)"
)
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_OF_SENTENCEPIECE = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


class _Type(IntEnum):
    """What a token is, in llama.cpp's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_of(header: GgufHeader) -> PreTrainedTokenizerBase:
    """The tokenizer of a file.

    Raises:
        ModelError: the file has none that can be built without guessing; the message has the cure.
    """
    kind = header.get("tokenizer.ggml.model")
    tokens = token_list(header)
    if not tokens:
        raise ModelError(f"{header.path} holds no tokenizer; {_CURE}")
    types = _types(header, len(tokens))
    if kind == "gpt2":
        backend, default_bos = _byte_level(header, tokens, types)
    elif kind == "llama":
        backend, default_bos = _sentencepiece(header, tokens, types), True
    else:
        raise ModelError(
            f"{header.path} has a tokenizer of the kind {kind!r}, which cannot be built from what "
            f"a GGUF file says; {_CURE}"
        )
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_Type.CONTROL, _Type.UNKNOWN)
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == _Type.USER_DEFINED and backend.token_to_id(token) is not None
        ]
    )
    return _finished(header, backend, tokens, default_bos)


def token_list(header: GgufHeader) -> list[str]:
    """A file's tokens as it spells them, without the rows that pad its head."""
    tokens = list(header.get("tokenizer.ggml.tokens") or ())
    types = _types(header, len(tokens))
    while tokens and (
        tokens[-1] == f"[PAD{len(tokens) - 1}]"
        and types[len(tokens) - 1] in (_Type.UNUSED, _Type.USER_DEFINED)
    ):
        tokens.pop()
    return tokens


def require_same_tokens(header: GgufHeader, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a tokenizer that is put beside a file has the file's tokens.

    Raises:
        ModelError: it has others; the message has the first id that differs.
    """
    listed = token_list(header)
    types = _types(header, len(listed))
    given = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    for id_, token in enumerate(listed):
        other = given.get(id_)
        if types[id_] == _Type.UNUSED and other is None:
            continue
        if other is None or _meaning(other) != _meaning(token):
            said = "no token" if other is None else repr(other)
            raise ModelError(
                f"tokenizer {name} is not that of {header.path}: id {id_} is {said} in it and "
                f"{token!r} in the file; {_CURE}"
            )


def _meaning(token: str) -> str:
    """A token as text: a file spells some bytes and space marks otherwise than tokenizers do.

    >>> _meaning("<0x09>") == _meaning("\\t"), _meaning("▁▁") == _meaning("  ")
    (True, True)
    """
    if len(token) == 6 and token.startswith("<0x") and token[5] == ">":
        byte = int(token[3:5], 16)
        return chr(byte) if byte < 0x80 else token
    return token.replace(SPACE_MARK, " ")


def _types(header: GgufHeader, count: int) -> list[int]:
    types = list(header.get("tokenizer.ggml.token_type") or ())[:count]
    return types + [_Type.NORMAL] * (count - len(types))


def _byte_level(header: GgufHeader, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """(byte-level BPE, whether texts begin with BOS if the file does not say)."""
    word = header.get("tokenizer.ggml.pre")
    if word not in RULES:
        said = (
            "does not say how its tokenizer cuts text beforehand (tokenizer.ggml.pre)"
            if word in (None, "default")
            else f"cuts text beforehand by the rules {word!r}, which are not known here"
        )
        raise ModelError(f"{header.path} {said}; {_CURE}")
    rules = RULES[word]
    merges = [_pair(merge) for merge in header.get("tokenizer.ggml.merges") or ()]
    if not merges:
        raise ModelError(f"{header.path} has no merges for its tokenizer; {_CURE}")
    backend = _with_model(header, tokens, merges, ignore_merges=rules.whole_first)
    backend.normalizer = rules.normalizer
    backend.pre_tokenizer = rules.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, rules.bos


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces are marks, and bytes stand in for unknown characters."""
    if header.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ModelError(
            f"{header.path} has a tokenizer that changes white space, as no tokenizer here does; "
            f"{_CURE}"
        )
    # Runs of spaces that were added to the vocabulary are spelled with spaces in the file.
    spelled = [SPACE_MARK * len(token) if set(token) == {" "} else token for token in tokens]
    vocabulary = {token: id_ for id_, token in enumerate(spelled)}
    ranks = _ranks(header, spelled, types)
    unknown = header.get("tokenizer.ggml.unknown_token_id", _OF_SENTENCEPIECE["unknown_token_id"])
    backend = _with_model(
        header,
        spelled,
        generate_merges(vocabulary, ranks),
        unk_token=tokens[unknown] if unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=_Type.BYTE in types,
    )
    marks: normalizers.Normalizer = normalizers.Replace(" ", SPACE_MARK)
    spaces = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.get("tokenizer.ggml.add_space_prefix", True):
        marks = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), marks])
        spaces.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = marks
    backend.decoder = decoders.Sequence(spaces)
    return backend


def _ranks(header: GgufHeader, tokens: list[str], types: list[int]) -> dict[str, float]:
    """By which tokens are merged, the highest first.

    SentencePiece looks for added tokens before anything else. The others come by their scores, or
    where a file has only placeholders for these, by their ids, which then are in the same order.
    """
    scores = list(header.get("tokenizer.ggml.scores") or ())
    normal = [id_ for id_, type_ in enumerate(types) if type_ == _Type.NORMAL]
    if len(scores) < len(tokens) or len({scores[id_] for id_ in normal}) <= 1:
        scores = [-float(id_) for id_ in range(len(tokens))]
    first = max((scores[id_] for id_ in normal), default=0.0) + 1
    added = [id_ for id_, type_ in enumerate(types) if type_ == _Type.USER_DEFINED]
    ranks = {tokens[id_]: first + len(added) - n for n, id_ in enumerate(added)}
    return ranks | {tokens[id_]: scores[id_] for id_ in normal}


def _with_model(
    header: GgufHeader, tokens: list[str], merges: list[tuple[str, str]], **settings: object
) -> Tokenizer:
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **settings))
    except Exception as error:  # the library has no class of its own for it
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{header.path} has merges that do not fit its tokens ({reason}); {_CURE}"
        ) from error


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[0] + left, right


def _finished(
    header: GgufHeader, backend: Tokenizer, tokens: list[str], default_bos: bool
) -> PreTrainedTokenizerBase:
    defaults = _OF_SENTENCEPIECE if header.get("tokenizer.ggml.model") == "llama" else {}
    ids = {
        name: header.get(f"tokenizer.ggml.{key}", defaults.get(key))
        for name, key in _SPECIAL.items()
    }
    special = {n: tokens[id_] for n, id_ in ids.items() if id_ is not None and id_ < len(tokens)}
    around = [
        special.get(name, "") if header.get(f"tokenizer.ggml.add_{name}", default) else ""
        for name, default in (("bos_token", default_bos), ("eos_token", False))
    ]
    if any(around):
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in (around[0], "$A", around[1]) if part),
            special_tokens=[(token, ids[name]) for name, token in special.items()],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.name_or_path = str(header.path)
    tokenizer.chat_template = header.get(CHAT_TEMPLATE)
    return tokenizer
