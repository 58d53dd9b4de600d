"""Random texts at every tokenizer at hand: does the walk cover them, refuse them, or err?

    python benchmarks/walk.py --texts 200000 --seed 0

Each text is thrown at each tokenizer of --tokenizers and of the zoo. The check knows
nothing of tokens as bytes: every prefix of the ids is decoded by the tokenizers library, and where
that gives whole characters, the boundary must be there.

    covered   the walk covered the text, every boundary where decoding puts it
    refused   the walk refused it, and the tokens indeed do not decode to the text
    wrong     a boundary elsewhere, or a text covered that the tokens do not decode to
    needless  refused, though the tokens decode to the text

`--quick` throws a hundredth of the texts; `--json` prints one flat object of figures.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from figures import add_tokenizers, command_line
from fusellm.models.places import ZOO, zoo_folder
from fusellm.tokens.encode import Encoder

_OUTCOMES = ("covered", "refused", "wrong", "needless")
_BATCH = 500
_WORDS = (
    "the", "return", "self", "import", "value", "def", "class", "1024", "3.14", "foo_bar", "--flag",
    "https://a.b/c", "don't", "naïve", "café", "Straße", "señor", "привет", "слово", "中文",
    "日本語", "ελληνικά", "العربية", "हिन्दी", "ไทย", "한국어", "עברית", "e\u0301", "a\u0323\u0301",
)  # fmt: skip
_ODD = (
    " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\x00", "\x0c", "\u00a0", "\u3000", "\u200b",
    "\u200d", "\ufeff", "\ufffd", "\U0010ffff", "\u0301", "\u0958", "\u2126", "\u1100\u1161",
    "\u2581", "Ġ", "İ", "</s>", "<s>", "<unk>", "<|endoftext|>", "<0x0A>", "👩\u200d👩\u200d👧",
    "🇩🇪", "👍🏽", "❤\ufe0f",
)  # fmt: skip
_SCRIPT_STARTS = (
    0x20, 0xA0, 0x100, 0x300, 0x370, 0x400, 0x530, 0x590, 0x600, 0x900, 0xB80, 0xE00, 0x1100,
    0x1E00, 0x2000, 0x2190, 0x2500, 0x3040, 0x4E00, 0xAC00, 0xFB00, 0xFF00, 0x10330, 0x1D400,
    0x1F300, 0x20000, 0xE0000,
)  # fmt: skip


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Words, odd characters, runs of one script, and bytes read as replacement text."""
    chance = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(chance) for _ in range(chance.randint(0, 8)))


def _piece(chance: random.Random) -> str:
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(_WORDS)
    if kind == 1:
        return " " + chance.choice(_WORDS)
    if kind == 2:
        return chance.choice(_ODD)
    if kind == 3:
        first = chance.choice(_SCRIPT_STARTS)
        return "".join(chr(first + chance.randrange(96)) for _ in range(chance.randint(1, 6)))
    if kind == 4:
        codes = (chance.randrange(0x110000 - 0x800) for _ in range(chance.randint(1, 4)))
        return "".join(chr(code if code < 0xD800 else code + 0x800) for code in codes)
    return chance.randbytes(chance.randint(1, 10)).decode("utf-8", "replace")


def outcome(encoder: Encoder, text: str, ids: list[int], ends: list[int] | None) -> str:
    """What became of one text: one of `_OUTCOMES`."""
    prefixes = encoder.tokenizer.backend_tokenizer.decode_batch(
        [ids[:n] for n in range(1, len(ids) + 1)], skip_special_tokens=False
    )
    whole = prefixes[-1] if prefixes else ""
    # The library's decoder drops the first space of SentencePiece-like tokenizers.
    front = "" if whole == text else " "
    special = not set(ids).isdisjoint(encoder.tokenizer.all_special_ids)
    is_spelled = front + whole == text and not special
    if ends is None:
        return "needless" if is_spelled else "refused"
    if not is_spelled or len(ends) != len(ids) or (ends or [0])[-1] != len(text.encode()):
        return "wrong"
    if ends != sorted(ends):
        return "wrong"
    for prefix, end in zip(prefixes, ends, strict=True):
        read = front + prefix
        within_character = prefix.endswith("\ufffd") or not text.startswith(read)
        if not within_character and len(read.encode()) != end:
            return "wrong"
    return "covered"


def tokenizers(real: Path) -> dict[str, Encoder]:
    """The real ones, where they are there, and the zoo's."""
    found = {}
    for folder in sorted(real.iterdir()) if real.is_dir() else []:
        if (folder / "tokenizer_config.json").exists():
            found[folder.name] = Encoder(AutoTokenizer.from_pretrained(folder))
        raw = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), **_special(folder)
        )
        found[f"{folder.name} raw"] = Encoder(raw)
    for name in ZOO:
        found[f"zoo/{name}"] = Encoder(AutoTokenizer.from_pretrained(zoo_folder(name)))
    return found


def _special(folder: Path) -> dict[str, str]:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    contents = {token["content"] for token in added}
    if "<s>" in contents:
        return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"eos_token": "<|endoftext|>"}


def main() -> None:
    """Throw the texts and print the counts."""
    parser = command_line(__doc__)
    add_tokenizers(parser)
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count = arguments.texts // 100 if arguments.quick else arguments.texts
    texts = list(random_texts(count, arguments.seed))
    figures: dict[str, float] = {"texts": count, "seed": arguments.seed}
    totals: Counter[str] = Counter()
    for name, encoder in tokenizers(arguments.tokenizers).items():
        began = time.perf_counter()
        counts: Counter[str] = Counter()
        before = len(encoder.vocabulary.prefix_ids)
        for at in range(0, count, _BATCH):
            batch = texts[at : at + _BATCH]
            for text, block in zip(batch, encoder.encode(batch, [False] * len(batch)), strict=True):
                ends = None if block.ends is None else block.ends[before:].tolist()
                counts[outcome(encoder, text, block.ids[before:].tolist(), ends)] += 1
        totals += counts
        figures |= {f"{key} {name}": counts[key] for key in _OUTCOMES}
        if not arguments.json:
            told = "  ".join(f"{key} {counts[key]:>7,}" for key in _OUTCOMES)
            print(f"{name:<18} {told}  ({time.perf_counter() - began:.0f} s)", flush=True)
    figures |= {key: totals[key] for key in _OUTCOMES}
    if arguments.json:
        print(json.dumps(figures))
    else:
        told = "  ".join(f"{key} {totals[key]:>7,}" for key in _OUTCOMES)
        print(f"{'together':<18} {told}  ({count:,} texts, seed {arguments.seed})")


if __name__ == "__main__":
    main()
