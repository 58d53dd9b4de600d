"""Token alignment: how fast, how much of the text, and whether it is right.

    python benchmarks/align.py            one target and one source
    python benchmarks/align.py --pairs    all pairs of the tokenizers in --tokenizers

Speeds are in target tokens per second on one core, over blocks of 2,048 target tokens of the
built-in corpus, everything after tokenization, compiled beforehand: of the boundaries (both walks,
alignment, situations) and of the dynamic programme, each over a plain-Python textbook of the
authors' double loop with `editdistance`. Ours are handed arrays of ids, the textbook lists of
spellings. What an aligned position has read is told here by itself:
from the tokens' spellings joined, at some positions from the tokenizers' own `decode`.

`--quick` takes under 40 seconds, `--json` prints one flat object of figures.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from figures import add_tokenizers, command_line, load_encoder, show
from fusellm.alignment.dynamic import least_path
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.vocabulary_maps import mined_map, spellings
from fusellm.arrays.ragged import offsets_of
from fusellm.tokens.encode import Encoder
from fusellm.tokens.walk import boundaries
from fusellm.zoo.text import DOMAINS, documents

try:
    from editdistance import eval as distance_of
except ImportError:
    from rapidfuzz.distance.Levenshtein import distance as distance_of

_ROOT = Path(__file__).resolve().parent.parent
_ZOO = _ROOT / "src" / "fusellm" / "zoo" / "weights"
_BLOCK_TOKENS = 2048
_CHARACTERS_READ = 40_000  # more than a block ever needs
_ROUNDS = 5
_DECODED_POSITIONS = 8


def texts_of(domain: str, count: int, target: Encoder) -> list[str]:
    """Texts of about 2,048 target tokens each, documents joined and cut."""
    found: list[str] = []
    left = ""
    for document in documents(["held_out", "validation", "train"], [domain]):
        left += document.text
        while len(left) >= _CHARACTERS_READ and len(found) < count:
            window = left[:_CHARACTERS_READ]
            (block,) = target.encode([window], [False])
            if block.ends is None:
                left = left[_CHARACTERS_READ:]
                continue
            end = int(block.ends[min(_BLOCK_TOKENS, len(block.ends) - 1)])
            text = window.encode()[:end].decode(errors="ignore")
            found.append(text)
            left = left[len(text) :]
        if len(found) == count:
            break
    return found


# Speed


def textbook(source: Sequence[str], target: Sequence[str]) -> tuple[int, list[tuple[int, int]]]:
    """The authors' double loop: (cost, path) over spellings with their space marks."""
    rows = [[math.inf] * (len(target) + 1) for _ in range(len(source) + 1)]
    rows[0][0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            cost = distance_of(a.replace("Ġ", ""), b.replace("▁", ""))
            rows[i + 1][j + 1] = cost + min(rows[i][j + 1], rows[i + 1][j], rows[i][j])
    i, j = len(source) - 1, len(target) - 1
    path = [(i, j)]
    while i > 0 or j > 0:
        options = (rows[i][j], rows[i][j + 1], rows[i + 1][j])
        move = options.index(min(options))
        i, j = i - (move != 2), j - (move != 1)
        path.append((i, j))
    return int(rows[-1][-1]), path[::-1]


@dataclass(frozen=True)
class Tokenized:
    """A text as both tokenizers cut it, without special tokens."""

    data: bytes
    source_ids: np.ndarray
    target_ids: np.ndarray


def tokenized(texts: Sequence[str], source: Encoder, target: Encoder) -> list[Tokenized]:
    """Ids as the models read them, but for BOS and EOS."""
    mine, theirs = (
        e.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for e in (source, target)
    )
    return [
        Tokenized(t.encode(), np.array(s, dtype=np.int64), np.array(i, dtype=np.int64))
        for t, s, i in zip(texts, mine, theirs, strict=True)
    ]


def by_boundaries(blocks: Sequence[Tokenized], source: Encoder, target: Encoder) -> np.ndarray:
    """Both walks, alignment and situations of a shard."""
    ends: dict[str, list[np.ndarray]] = {"source": [], "target": []}
    nothing = np.zeros(0, dtype=np.int64)
    for block in blocks:
        mine = boundaries(block.data, block.target_ids, target.vocabulary)
        theirs = boundaries(block.data, block.source_ids, source.vocabulary)
        ends["target"].append(nothing if mine is None else mine)
        ends["source"].append(nothing if theirs is None else theirs)
    flat = [
        array
        for side in ("target", "source")
        for array in (
            np.concatenate(ends[side]),
            offsets_of(np.array([len(e) for e in ends[side]])),
        )
    ]
    return align_shard(flat[0], flat[1], flat[2], flat[3])[1]


def seconds(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """The least of several runs."""
    least = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least


def speeds(
    blocks: Sequence[Tokenized], textbook_blocks: Sequence[Tokenized], pair: tuple[Encoder, Encoder]
) -> dict[str, float]:
    """Target tokens per second of the three, and their ratios."""
    source, target = pair
    marked = source.tokenizer, target.tokenizer
    bare = spellings(source, space=""), spellings(target, space="")

    def dynamic() -> None:
        for block in blocks:
            least_path(block.source_ids, block.target_ids, *bare)

    tokens = sum(len(block.target_ids) for block in blocks)
    by_boundaries(blocks, source, target)  # compile
    least_path(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), *bare)
    figures = {
        "boundaries_tokens_per_second": tokens
        / seconds(lambda: by_boundaries(blocks, source, target), 4 * _ROUNDS),
        "dtw_tokens_per_second": tokens / seconds(dynamic, 2),
    }
    spent = 0.0
    for block in textbook_blocks:
        ids = block.source_ids, block.target_ids
        spelled = [m.convert_ids_to_tokens(i.tolist()) for m, i in zip(marked, ids, strict=True)]
        start = time.perf_counter()
        cost, path = textbook(*spelled)
        spent += time.perf_counter() - start
        found = least_path(*ids, *bare)
        met = list(zip(found.sources.tolist(), found.targets.tolist(), strict=True))
        if (found.cost, met) != (cost, path):
            raise SystemExit("the dynamic programme differs from the textbook")
    figures["textbook_tokens_per_second"] = (
        sum(len(block.target_ids) for block in textbook_blocks) / spent
    )
    for name in ("boundaries", "dtw"):
        figures[f"{name}_over_textbook"] = (
            figures[f"{name}_tokens_per_second"] / figures["textbook_tokens_per_second"]
        )
    return figures


# Truth


class Reader:
    """What a tokenizer's tokens have read, told from their spellings."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        tokenizer = encoder.tokenizer
        added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[int, bytes] = {}
        for spelling, id_ in tokenizer.get_vocab().items():
            if id_ in tokenizer.all_special_ids:
                self._bytes[id_] = b""
            elif id_ in added:
                self._bytes[id_] = added[id_].encode()
            elif not encoder.vocabulary.space_mark:
                self._bytes[id_] = bytes(byte_of[character] for character in spelling)
            elif spelling.startswith("<0x"):
                self._bytes[id_] = bytes.fromhex(spelling[3:5])
            else:
                self._bytes[id_] = spelling.replace("▁", " ").encode()

    def prefixes(self, ids: np.ndarray, text: str) -> list[bytes] | None:
        """The text read up to each position; None where the tokens do not give the text."""
        pieces = [self._bytes[id_] for id_ in ids.tolist()]
        joined, data = b"".join(pieces), text.encode()
        if joined not in (data, b" " + data):
            return None
        dummy = len(joined) - len(data)
        reached = np.cumsum([len(piece) for piece in pieces]).tolist()
        return [joined[dummy : max(end, dummy)] for end in reached]

    def decoded(self, ids: np.ndarray, position: int) -> str:
        """The same from the tokenizer's own decoder, which drops a first space or keeps it."""
        text = self.encoder.tokenizer.decode(
            ids[: position + 1].tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(text).lstrip(" ")


@dataclass
class Seen:
    """What was met over the texts of one domain."""

    positions: int = 0
    aligned: int = 0
    wrong: int = 0
    missed: int = 0
    decoded: int = 0
    left_out: int = 0
    situations: np.ndarray = field(default_factory=lambda: np.zeros(len(Situation), dtype=np.int64))


def check(texts: Sequence[str], source: Reader, target: Reader) -> Seen:
    """Hold the alignment against what both have read, position by position."""
    seen = Seen()
    chance = np.random.default_rng(0)
    whole = [True] * len(texts)
    encoded = zip(
        texts, target.encoder.encode(texts, whole), source.encoder.encode(texts, whole), strict=True
    )
    for text, mine, theirs in encoded:
        read = target.prefixes(mine.ids, text), source.prefixes(theirs.ids, text)
        if mine.ends is None or theirs.ends is None or read[0] is None or read[1] is None:
            seen.left_out += 1
            seen.wrong += sum(
                (ends is None) != (prefixes is None)
                for ends, prefixes in zip((mine.ends, theirs.ends), read, strict=True)
            )
            continue
        offsets = np.array([0, len(mine.ends)]), np.array([0, len(theirs.ends)])
        found, situation = align_shard(mine.ends, offsets[0], theirs.ends, offsets[1])
        # The last position that has read a prefix stands for it; the last of all predicts nothing.
        last_mine = {prefix: i for i, prefix in enumerate(read[0][:-1])}
        last_theirs = {prefix: j for j, prefix in enumerate(read[1][:-1])}
        expected = np.full(len(found), -1)
        for prefix, i in last_mine.items():
            expected[i] = last_theirs.get(prefix, -1)
        seen.positions += len(found)
        seen.aligned += int((found >= 0).sum())
        seen.wrong += int(((found >= 0) & (found != expected)).sum())
        seen.missed += int(((found < 0) & (expected >= 0)).sum())
        seen.situations += np.bincount(situation, minlength=len(Situation))
        some = chance.permutation(np.nonzero(found >= 0)[0])[:_DECODED_POSITIONS]
        for i in some.tolist():
            spelled = target.decoded(mine.ids, i), source.decoded(theirs.ids, int(found[i]))
            if not spelled[0].endswith("\ufffd"):  # inside a character decoders differ
                seen.decoded += 1
                seen.wrong += spelled[0] != spelled[1]
    return seen


def truth(
    texts: dict[str, list[str]], names: tuple[str, str], readers: tuple[Reader, Reader]
) -> Iterator[tuple[str, Seen]]:
    """(domain, what was met) for one pair, printed as it comes."""
    source, target = readers
    for domain, some in texts.items():
        seen = check(some, source, target)
        shares = seen.situations / max(seen.positions, 1)
        print(
            f"{names[1]:>14} <- {names[0]:<14} {domain:<7} "
            + " ".join(f"{shares[s]:.3f}" for s in Situation)
            + f"  aligned {seen.aligned / max(seen.positions, 1):.3f} of {seen.positions:,}"
            + f"  wrong {seen.wrong}  missed {seen.missed}  left out {seen.left_out}",
            file=sys.stderr,
        )
        yield domain, seen


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add_tokenizers(parser)
    parser.add_argument("--target", type=Path, help="llama-2, or zoo/prose")
    parser.add_argument("--source", type=Path, help="gpt-neox-20b, or zoo/python")
    parser.add_argument(
        "--pairs",
        type=Path,
        nargs="*",
        metavar="PATH",
        help="check all pairs of these tokenizers; of all of --tokenizers where none is named",
    )
    arguments = parser.parse_args()
    real = arguments.tokenizers
    there = (real / "llama-2").is_dir() and (real / "gpt-neox-20b").is_dir()
    arguments.target = arguments.target or (real / "llama-2" if there else _ZOO / "prose")
    arguments.source = arguments.source or (real / "gpt-neox-20b" if there else _ZOO / "python")
    return arguments


def coverage(
    texts: dict[str, list[str]], folders: Sequence[Path], first: tuple[Path, Path]
) -> dict[str, float]:
    """Shares aligned of the pair `first` and of all pairs of `folders`, and what was wrong."""
    figures = {"coverage": 1.0, "wrong": 0.0, "missed": 0.0, "decoded": 0.0, "left_out": 0.0}
    readers = {folder: Reader(load_encoder(folder)) for folder in (*first, *folders)}
    for two in (first, *(pair for pair in permutations(folders, 2) if pair != first)):
        names = two[0].name, two[1].name
        for domain, seen in truth(texts, names, (readers[two[0]], readers[two[1]])):
            share = seen.aligned / max(seen.positions, 1)
            figures[f"coverage {names[1]} <- {names[0]} {domain}"] = share
            if two == first:
                figures["coverage"] = min(figures["coverage"], share)
            for name in ("wrong", "missed", "decoded", "left_out"):
                figures[name] += getattr(seen, name)
    return figures


def main() -> None:
    """Measure, check, print."""
    arguments = arguments_of()
    library = distance_of.__module__.split(".")[0]
    print(f"edit distance of the textbook: {library}", file=sys.stderr)

    pair = load_encoder(arguments.source), load_encoder(arguments.target)
    texts = {d: texts_of(d, 6 if arguments.quick else 60, pair[1]) for d in DOMAINS}
    blocks = {domain: tokenized(some, *pair) for domain, some in texts.items()}
    count = 1 if arguments.quick else 3
    figures = speeds(
        [block for some in blocks.values() for block in some],
        [block for some in blocks.values() for block in some[:count]],
        pair,
    )
    start = time.perf_counter()
    mined_map(*pair)
    figures["mined_map_seconds"] = time.perf_counter() - start

    print("situations: " + ", ".join(s.name.lower() for s in Situation), file=sys.stderr)
    folders: list[Path] = []
    if arguments.pairs is not None:
        folders = arguments.pairs or sorted(f for f in arguments.tokenizers.iterdir() if f.is_dir())
    figures |= coverage(texts, folders, (arguments.source, arguments.target))
    show(figures, arguments.json)


if __name__ == "__main__":
    main()
