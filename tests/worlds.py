"""Tiny tokenizers of each family, trained on the fly, and the texts that try them.

Nothing is downloaded. The real tokenizers beside the project are used where they are.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusellm.tokens.encode import Encoder
from fusellm.zoo.tokenizers import byte_level_bpe, byte_level_unigram, sentencepiece_like_bpe

SHARED = Path(__file__).resolve().parents[2] / "shared"

_WORDS = (
    "the return returned returning returns turn token tokens tokenizer of and to in is value "
    "values self import from class def none true false model models train training trained text "
    "texts distribution probability mass kept source target position boundary byte bytes unite "
    "united unity interest interesting nation national international 1 2 10 100 1024 2024 naïve "
    "café über Straße año señor привет мир слово слова 中文 文字 日本 日本語 ελληνικά"
)
WORDS = _WORDS.split()
LINES = (
    "def returned(self, values):\n    return [value for value in values]\n",
    "class Token(Model):\n    def __init__(self):\n        self.mass = 1.0\n",
    "for (int i = 0; i < n; ++i) {\n\ttotal += values[i];\n}\n",
    "import numpy as np\nfrom pathlib import Path\n\n\n",
)
SPELLED_OUT = ("</s>", "<s>", "<unk>", "<|endoftext|>", "<0x0A>", "<pad>", "[UNK]")
TRICKY = (
    *SPELLED_OUT,
    " ",
    "  ",
    "    ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "\x0c",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "e\u0301",
    "é",
    "a\u0301\u0323",
    "\u1100\u1161",
    "\u0958",
    "\u2126",
    "\u0340",
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "👍🏽",
    "\u2581",
    "x\u2581y",
    "Ġ",
    "İ",
    *LINES,
)


def corpus() -> Iterator[str]:
    """Documents to train on: the same everywhere."""
    chance = random.Random(7)
    for _ in range(300):
        yield " ".join(chance.choices(WORDS, k=12)).capitalize() + ".\n"
        yield chance.choice(LINES)


@cache
def sentencepiece() -> Encoder:
    """Space marks, dummy prefix where there is no space, byte fallback, BOS by default."""
    return Encoder(sentencepiece_like_bpe(corpus(), 256 + 420))


@cache
def byte_bpe() -> Encoder:
    """Byte-level BPE, no BOS."""
    return Encoder(byte_level_bpe(corpus(), 640))


@cache
def byte_unigram() -> Encoder:
    """Byte-level Unigram, no BOS."""
    return Encoder(byte_level_unigram(corpus(), 560))


@cache
def always_prefixed() -> Encoder:
    """SentencePiece as it is where a dummy prefix comes even before a space ("▁▁a" for " a")."""
    trained = sentencepiece().tokenizer.backend_tokenizer
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return Encoder(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


@cache
def byte_fallback_off() -> Encoder:
    """Space marks without byte fallback: a character it does not know becomes `<unk>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["plain words and plain sentences of plain letters"] * 9, trainer)
    return Encoder(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    )


@cache
def normalizing(name: str) -> Encoder:
    """A byte-level tokenizer that changes text first: `lower` or `nfc`."""
    tokenizer = Tokenizer.from_str(byte_bpe().tokenizer.backend_tokenizer.to_str())
    tokenizer.normalizer = {"lower": normalizers.Lowercase(), "nfc": normalizers.NFC()}[name]
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))


FAMILIES = {
    "sentencepiece": sentencepiece,
    "always-prefixed": always_prefixed,
    "byte-bpe": byte_bpe,
    "byte-unigram": byte_unigram,
}
REAL = ("llama-2", "mistral", "gpt2", "gpt-neox-20b")


@cache
def _real(name: str) -> Encoder:
    folder = SHARED / "tokenizers" / name
    if name in ("llama-2", "mistral"):
        return Encoder(AutoTokenizer.from_pretrained(folder))
    return Encoder(
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
        )
    )


def encoder_of(name: str) -> Encoder:
    """One of FAMILIES or of REAL; skips the test where a real one is not beside the project."""
    if name in FAMILIES:
        return FAMILIES[name]()
    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip(f"needs {SHARED / 'tokenizers' / name}, which is not part of the project")
    return _real(name)


def changes(encoder: Encoder, text: str) -> bool:
    """Whether a tokenizer changes a text, told without looking at its tokens.

    SentencePiece takes U+2581 for a space, and GPT-NeoX composes characters (NFC).
    """
    if encoder.vocabulary.space_mark:
        return "\u2581" in text
    normalizer = encoder.tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str(text) != text


_ANY = st.characters(exclude_categories=("Cs",))
_PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(TRICKY),
    st.sampled_from(WORDS).map(lambda word: " " + word),
    st.integers(1, 9).map(lambda n: " " * n),
    st.text(_ANY, max_size=6),
)


def texts() -> st.SearchStrategy[str]:
    """Words, code, special tokens spelled out, white space, and characters of all planes."""
    return st.lists(_PIECES, max_size=14).map("".join)


def sample_text(seed: int, words: int = 60) -> str:
    """A text of the training's kind."""
    chance = random.Random(seed)
    parts = [" ".join(chance.choices(WORDS, k=words // 3)) + "\n" for _ in range(3)]
    pairs = zip(parts, chance.sample(LINES, 3), strict=True)
    return "".join(prose + code for prose, code in pairs)
