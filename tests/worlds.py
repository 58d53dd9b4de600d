"""Tiny tokenizers of each family, trained on the fly, and the texts that try them.

Nothing is downloaded. The real tokenizers beside the project are used where they are.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

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


NORMALIZERS: dict[str, Callable[[], normalizers.Normalizer]] = {
    "lower": normalizers.Lowercase,
    "nfc": normalizers.NFC,
    "nfkc": normalizers.NFKC,
    "strip": normalizers.Strip,
    "one-space": lambda: normalizers.Replace(Regex(" {2,}"), " "),
    "accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}


@cache
def normalizing(name: str) -> Encoder:
    """A byte-level tokenizer that changes text first, by one of NORMALIZERS."""
    tokenizer = Tokenizer.from_str(byte_bpe().tokenizer.backend_tokenizer.to_str())
    tokenizer.normalizer = NORMALIZERS[name]()
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))


@cache
def _prepending(scheme: str) -> Encoder:
    """`sentencepiece` with another rule for its dummy prefix."""
    layout = json.loads(sentencepiece().tokenizer.backend_tokenizer.to_str())
    layout["pre_tokenizer"]["pretokenizers"][0]["prepend_scheme"] = scheme
    return Encoder(_fast(Tokenizer.from_str(json.dumps(layout))))


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def unigram(has_byte_tokens: bool) -> Encoder:
    """Unigram with space marks, with or without byte fallback, as T5's or XLNet's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    layout = json.loads(tokenizer.to_str())
    pieces = layout["model"]["vocab"]
    if has_byte_tokens:
        fallbacks = [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
        layout["model"] |= {"vocab": pieces[:3] + fallbacks + pieces[3:], "byte_fallback": True}
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.decoder = sentencepiece().tokenizer.backend_tokenizer.decoder
    return Encoder(_fast(tokenizer))


@cache
def byte_prefixed() -> Encoder:
    """Byte-level with a dummy prefix, as RoBERTa's may have."""
    tokenizer = Tokenizer.from_str(byte_bpe().tokenizer.backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))


@cache
def gemma_like() -> Encoder:
    """No dummy prefix; spaces become marks in the normalizer; "▁▁" is listed as an added token."""
    layout = json.loads(sentencepiece().tokenizer.backend_tokenizer.to_str())
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    layout |= {"normalizer": mark, "pre_tokenizer": None, "post_processor": None}
    layout["decoder"]["decoders"].pop()  # which strips the dummy prefix
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    plain = {"normalized": False, "special": False}
    tokenizer.add_tokens([AddedToken(content, **plain) for content in ("▁▁", "\n\n", "<b>")])
    return Encoder(_fast(tokenizer))


PREFIX = ("[gMASK]", "<sop>")


def putting(
    base: PreTrainedTokenizerBase, before: Sequence[str], after: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer whose post-processor puts special tokens before and after a text, as GLM's."""
    tokenizer = Tokenizer.from_str(base.backend_tokenizer.to_str())
    tokenizer.add_special_tokens([*before, *after])
    around = dict.fromkeys([*before, *after])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )
    names = {key: str(value) for key, value in base.special_tokens_map.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def glm_like() -> Encoder:
    """Byte-level; two tokens before every text, neither of them BOS, and EOS after it."""
    return Encoder(putting(byte_bpe().tokenizer, PREFIX, ["<|endoftext|>"]))


ADDED = ("<add>", "<br>\n", "中文<")


def with_added(base: Encoder, normalized: bool = False, **flags: bool) -> Encoder:
    """A tokenizer with the tokens ADDED, which are not special."""
    tokenizer = Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(c, normalized=normalized, **flags) for c in ADDED])
    names = {key: str(value) for key, value in base.tokenizer.special_tokens_map.items()}
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


class SlowByteLevel(PreTrainedTokenizer):
    """A tokenizer in Python that spells bytes by GPT-2's alphabet."""

    def __init__(self, **kwargs: Any) -> None:
        self.model = byte_bpe().tokenizer.backend_tokenizer
        super().__init__(eos_token="<|endoftext|>", special_tokens_pattern="none", **kwargs)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return dict(self.model.get_vocab() | self.added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces = self.model.pre_tokenizer.pre_tokenize_str(text)
        return [t.value for piece, _ in pieces for t in self.model.model.tokenize(piece)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.model.token_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.model.id_to_token(index))


class SlowWords(SlowByteLevel):
    """A tokenizer in Python that does not tell where words begin."""

    def _convert_id_to_token(self, index: int) -> str:
        return super()._convert_id_to_token(index).replace("Ġ", "")


@cache
def slow_byte_level() -> Encoder:
    """Byte-level, written in Python."""
    return Encoder(SlowByteLevel())


@cache
def raw_bytes() -> Encoder:
    """A token a byte, written in Python."""
    return Encoder(ByT5Tokenizer())


@cache
def slow_sentencepiece() -> Encoder:
    """The `sentencepiece` library behind a tokenizer in Python; doubles its dummy prefix."""
    return Encoder(slow_sentencepiece_tokenizer())


def slow_sentencepiece_tokenizer(**settings: Any) -> PreTrainedTokenizerBase:
    """A model trained by the `sentencepiece` library; skips where that is not installed."""
    library = pytest.importorskip("sentencepiece", reason="needs the sentencepiece library")
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    defaults = {"vocab_size": 480, "byte_fallback": True, "remove_extra_whitespaces": False}
    with tempfile.TemporaryDirectory() as folder:
        library.SentencePieceTrainer.train(
            sentence_iterator=corpus(),
            model_prefix=f"{folder}/slow",
            minloglevel=2,
            num_threads=1,
            **({"normalization_rule_name": "identity"} | defaults | settings),
        )
        return SentencePieceBackend(
            vocab_file=f"{folder}/slow.model", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )


FAMILIES = {
    "sentencepiece": sentencepiece,
    "always-prefixed": always_prefixed,
    "byte-bpe": byte_bpe,
    "byte-unigram": byte_unigram,
}
MORE_FAMILIES: dict[str, Callable[[], Encoder]] = {
    "prefixed-unless-space": lambda: _prepending("always"),
    "never-prefixed": lambda: _prepending("never"),
    "unigram": lambda: unigram(True),
    "unigram-unknown": lambda: unigram(False),
    "byte-prefixed": byte_prefixed,
    "gemma-like": gemma_like,
    "glm-like": glm_like,
}
SLOW_FAMILIES: dict[str, Callable[[], Encoder]] = {
    "slow-byte-level": slow_byte_level,
    "slow-sentencepiece": slow_sentencepiece,
    "raw-bytes": raw_bytes,
}
REAL = ("llama-2", "mistral", "gpt2", "gpt-neox-20b")


@cache
def added_to(name: str, normalized: bool = False, **flags: bool) -> Encoder:
    """A family's tokenizer with ADDED."""
    return with_added(encoder_of(name), normalized, **flags)


def layout_of(name: str) -> dict[str, Any]:
    """A copy of a family's tokenizer.json."""
    layout: dict[str, Any] = json.loads(encoder_of(name).tokenizer.backend_tokenizer.to_str())
    return layout


def tokenizer_of(layout: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    return Tokenizer.from_str(json.dumps(layout))


def fast_of(layout: dict[str, Any]) -> Encoder:
    """The encoder of a tokenizer.json, with the special tokens that it has."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if "<s>" not in str(layout["added_tokens"]):
        special = {"eos_token": "<|endoftext|>"}
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(layout), **special))


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
    """A family's or a real tokenizer; skips where a real one is not beside the project."""
    families = FAMILIES | MORE_FAMILIES | SLOW_FAMILIES
    if name in families:
        return families[name]()
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


# First and last characters of blocks of Unicode, so that texts stay within a script.
_SCRIPTS = (
    "az", "àÿ", "ΑΩ", "АЯ", "Աև", "את", "ءي", "ܐܬ", "अह", "কহ", "ਕਹ", "అహ", "กฮ", "ကအ", "აჰ",
    "ሀፐ", "ក឴", "ᠠᡷ", "ぁん", "ァン", "ㄅㄩ", "가힣", "一龥", "ऀः", "\u0300\u036f", "☀⛿", "𐌰𐍊",
    "𝐀𝟿", "😀🙏", "🏻🏿", "🇦🇿", "\ufe00\ufe0f", "𠀀𠃿",
)  # fmt: skip


def any_text() -> st.SearchStrategy[str]:
    """`texts`, runs of one script with combining marks, and bytes read as replacement text."""
    one_script = st.sampled_from(_SCRIPTS).flatmap(
        lambda ends: st.text(
            st.characters(min_codepoint=ord(ends[0]), max_codepoint=ord(ends[1]))
            | st.sampled_from(" \u0301\u200d\ufe0f\x00"),
            max_size=10,
        )
    )
    as_replaced = st.binary(max_size=24).map(lambda data: data.decode("utf-8", "replace"))
    return st.one_of(texts(), one_script, as_replaced)


def sample_text(seed: int, words: int = 60) -> str:
    """A text of the training's kind."""
    chance = random.Random(seed)
    parts = [" ".join(chance.choices(WORDS, k=words // 3)) + "\n" for _ in range(3)]
    pairs = zip(parts, chance.sample(LINES, 3), strict=True)
    return "".join(prose + code for prose, code in pairs)
