"""Tokenizers of the zoo, one of each family that the paper's models have.

They are trained on a mixture of all three domains, as those of real models are, so that they cut
text alike at most positions (`docs/zoo.md` has the shares).
"""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_GPT2_PIECES = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as GPT-2 and NeoX
)
_SINGLE_DIGIT_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?!\S)|\s+"
_SENTENCEPIECE_PIECES = r"▁?\p{L}+|▁?\p{N}|▁?[^\s\p{L}\p{N}▁]+|\n|▁+(?=▁[^▁\s])|▁+|\s"
_LONGEST_TOKEN_CHARACTERS = 16
_SENTENCEPIECE_CHARACTERS = 120  # the rest is spelled in bytes
_END_OF_TEXT = "<|endoftext|>"
_BYTE_LEVEL: dict[str, Any] = {
    "special_tokens": [_END_OF_TEXT],
    "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    "show_progress": False,
}


def sentencepiece_like_bpe(texts: Iterator[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """BPE over characters with space marks, a dummy prefix and byte fallback, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(_SENTENCEPIECE_PIECES), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 256,
        special_tokens=special,
        limit_alphabet=_SENTENCEPIECE_CHARACTERS,
        max_token_length=_LONGEST_TOKEN_CHARACTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = _with_byte_tokens(tokenizer, len(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _with_byte_tokens(tokenizer: Tokenizer, special: int) -> Tokenizer:
    layout = json.loads(tokenizer.to_str())
    trained = sorted(layout["model"]["vocab"].items(), key=lambda item: item[1])
    spellings = [spelling for spelling, _ in trained]
    fallbacks = [f"<0x{byte:02X}>" for byte in range(256)]
    ordered = spellings[:special] + fallbacks + spellings[special:]
    layout["model"]["vocab"] = {spelling: id_ for id_, spelling in enumerate(ordered)}
    return Tokenizer.from_str(json.dumps(layout))


def byte_level_bpe(texts: Iterator[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-NeoX's."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, max_token_length=_LONGEST_TOKEN_CHARACTERS, **_BYTE_LEVEL
    )
    return _byte_level(Tokenizer(models.BPE()), _GPT2_PIECES, texts, trainer)


def byte_level_unigram(texts: Iterator[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A Unigram model over bytes."""
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size, max_piece_length=_LONGEST_TOKEN_CHARACTERS, **_BYTE_LEVEL
    )
    return _byte_level(Tokenizer(models.Unigram()), _SINGLE_DIGIT_PIECES, texts, trainer)


def _byte_level(
    tokenizer: Tokenizer, pieces: str, texts: Iterator[str], trainer: trainers.Trainer
) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT)
