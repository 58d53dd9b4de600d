"""How a GGUF file's word for a pre-tokenization becomes rules.

A byte-level tokenizer cuts text into pieces before it merges bytes within them. A GGUF file has
the vocabulary and the merges, and of those rules one word alone (`tokenizer.ggml.pre`). llama.cpp
gives the word by how the original tokenizer cuts a trial text. Each word here has the rules of the
original's tokenizer.json; where two originals of one word differ, the word is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

Step = Callable[[], pre_tokenizers.PreTokenizer]


@dataclass(frozen=True)
class GgufRules:
    """What a tokenizer.json says besides vocabulary and merges.

    Attributes:
        steps: how text is cut, one after another.
        composes: whether characters are composed first (NFC).
        whole_first: whether a piece that is a token is taken whole, without merges.
        bos: whether a text begins with BOS where the file does not say.
    """

    steps: tuple[Step, ...]
    composes: bool = False
    whole_first: bool = False
    bos: bool = False

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        """As the `tokenizers` library has it."""
        return normalizers.NFC() if self.composes else None

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """As the `tokenizers` library has it.

        >>> [piece for piece, _ in RULES["smollm"].pre_tokenizer.pre_tokenize_str("in 2024")]
        ['in', 'Ġ', '2', '0', '2', '4']
        """
        made = [step() for step in self.steps]
        return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


def _split(pattern: str) -> Step:
    return lambda: pre_tokenizers.Split(Regex(pattern), "isolated")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    """Bytes, cut as GPT-2 cuts: a word with the space before it, and so numbers and signs."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _bytes() -> pre_tokenizers.PreTokenizer:
    """Bytes, cut no further."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _cl100k(numbers: str) -> str:
    """The pieces of GPT-4's tokenizer, with another rule for numbers."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _by_case(numbers: str, contraction: str) -> str:
    """The pieces of GPT-4o's tokenizer: a word ends where a small letter meets a capital one."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters of scripts that have small and capital ones. As numbers, since an editor that composes
# characters would turn some ends of these ranges into others.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASCII_AND_WIDE_SIGNS = r"!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"

_GPT2 = GgufRules((_gpt2,))
_NEOX = GgufRules((_gpt2,), composes=True)
_SINGLE_DIGITS = GgufRules((_digits, _gpt2))
_QWEN2 = GgufRules((_split(_cl100k(r"\p{N}")), _bytes), composes=True)
_GPT4 = GgufRules((_split(_cl100k(r"\p{N}{1,3}")), _bytes))
_LLAMA3 = GgufRules(_GPT4.steps, whole_first=True, bos=True)
_DEEPSEEK_CODER = (
    _split(r"[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _split(_EAST_ASIAN),
    _digits,
    _bytes,
)
_DEEPSEEK_LLM = (
    _split(r"[\r\n]"),
    _split(rf"\s?[{_CASED}]+"),
    _split(rf"\s?[{_ASCII_AND_WIDE_SIGNS}]+"),
    _split(r"\s+$"),
    _split(_EAST_ASIAN),
    _digits,
    _bytes,
)
_FALCON = (
    lambda: pre_tokenizers.Punctuation("contiguous"),
    _gpt2,
    lambda: pre_tokenizers.Digits(individual_digits=False),
    _split("[0-9][0-9][0-9]"),
)

RULES: dict[str, GgufRules] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": GgufRules(_SINGLE_DIGITS.steps, composes=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "qwen35": GgufRules((_split(_QWEN35), _bytes), composes=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _GPT4,
    "gpt-4o": GgufRules((_split(_by_case(r"\p{N}{1,3}", f"{_CONTRACTION}?")), _bytes)),
    "tekken": GgufRules((_split(_by_case(r"\p{N}", "")), _bytes), whole_first=True, bos=True),
    "bloom": GgufRules((_split(_BLOOM), _bytes)),
    "falcon": GgufRules(_FALCON),
    "deepseek-coder": GgufRules(_DEEPSEEK_CODER),
    "deepseek-llm": GgufRules(_DEEPSEEK_LLM),
}
"""By the words of `tokenizer.ggml.pre`. Their originals: openai-community/gpt2, microsoft/phi-2,
mosaicml/mpt-7b, allenai/OLMo-1.7-7B-hf (both GPT-NeoX's), HuggingFaceTB/SmolLM-135M,
bigcode/starcoder2-3b, smallcloudai/Refact-1_6-base, CohereForAI/c4ai-command-r-v01,
Qwen/Qwen1.5-7B, deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, stabilityai/stablelm-2-zephyr-1_6b,
Qwen/Qwen3.5-9B-Instruct, meta-llama/Meta-Llama-3-8B (under three words), databricks/dbrx-base,
Xenova/gpt-4o, mistralai/Mistral-Nemo-Base-2407, bigscience/bloom, tiiuae/falcon-7b,
deepseek-ai/deepseek-coder-6.7b-base and deepseek-ai/deepseek-llm-7b-base."""
