"""Where fusion gains and loses: in text that stands in the training text, and in text that is new.

    python benchmarks/repeated_text.py --run RUN [--window BYTES] [--quick] [--json]

Licences, includes and boilerplate stand in many files of the installed packages. Plain training
learns such text by heart, with its whole weight; fusion has but λ of it for the text's own labels.
So a byte of held-out text is *repeated* where it and the 31 bytes before it stand in the training
text, and *new* elsewhere. Of a finished run, by domain and on the mean:

    share DOMAIN           how much of the scored text is repeated
    CLM repeated|new DOMAIN, fused …
                           bits per byte of these bytes alone
    difference repeated|new DOMAIN, and low, high
                           fused − CLM of the same, with its 95 % interval over documents; without
                           low and high where there are too few

`--quick` makes a small run of the zoo; `--json` prints the figures as one object.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from boundaries import made, nats_of
from figures import command_line, show
from fusellm.evaluation.text.intervals import Scores, records
from fusellm.store.blocks import Block, open_corpus, read_part

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: products mod 2^64 keep what they were made from
_KINDS = ("repeated", "new")


def hashes(data: bytes, window: int) -> np.ndarray:
    """[len - window + 1] uint64, a polynomial of each window of bytes.

    >>> a, b, c = hashes(b"abab", 2).tolist()
    >>> a == c != b
    True
    """
    values = np.frombuffer(data, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    count = max(len(values) - window + 1, 0)
    sums = np.zeros(count, dtype=np.uint64)
    for k in range(window):
        sums = sums * _BASE + values[k : k + count]
    return sums


def documents(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Numbers of the blocks of each document, which belong together in their order."""
    of_document: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for n, block in enumerate(blocks):
        of_document[block.domain, block.document].append(n)
    yield from of_document.values()


def repeated(train: Sequence[Block], held_out: Sequence[Block], window: int) -> list[np.ndarray]:
    """Of each held-out block [its bytes] bool: whether they stand in the training text."""
    known = [
        hashes("".join(train[n].text for n in numbers).encode(), window)
        for numbers in documents(train)
    ]
    table = np.unique(np.concatenate(known))
    marks = [np.zeros(0, dtype=np.bool_)] * len(held_out)
    for numbers in documents(held_out):
        texts = [held_out[n].text.encode() for n in numbers]
        asked = hashes(b"".join(texts), window)
        place = np.minimum(np.searchsorted(table, asked), len(table) - 1)
        ends = np.zeros(sum(map(len, texts)), dtype=np.bool_)
        ends[window - 1 : window - 1 + len(asked)] = table[place] == asked
        cuts = np.cumsum([len(text) for text in texts])[:-1]
        for n, part in zip(numbers, np.split(ends, cuts), strict=True):
            marks[n] = part
    return marks


def measured(run: Path, window: int) -> dict[str, float]:
    """Figures of a run."""
    corpus = open_corpus(run)
    train, held_out = read_part(corpus, "train"), read_part(corpus, "held_out")
    marks = repeated(train, held_out, window)
    nats = {name: nats_of(run, name) for name in ("clm", "fused")}
    number = {key: n for n, key in enumerate({(b.domain, b.document): 0 for b in held_out})}
    domains = [domain for domain, _ in number]
    sums = {kind: {name: np.zeros(len(number)) for name in nats} for kind in _KINDS}
    scored = {kind: np.zeros(len(number), dtype=np.int64) for kind in _KINDS}
    for n, block in enumerate(held_out):
        rows = np.stack([nats[name][n] for name in nats])
        if not rows.shape[1]:
            continue
        usable = np.isfinite(rows).all(axis=0)
        document = number[block.domain, block.document]
        for kind, chosen in zip(_KINDS, (usable & marks[n], usable & ~marks[n]), strict=True):
            scored[kind][document] += int(chosen.sum())
            for name, row in zip(nats, rows, strict=True):
                sums[kind][name][document] += float(row[chosen].sum())
    labels, figures = np.array(domains), dict[str, float]()
    for domain in dict.fromkeys(domains):
        of = {kind: int(scored[kind][labels == domain].sum()) for kind in _KINDS}
        figures[f"share {domain}"] = of["repeated"] / sum(of.values())
    for kind in _KINDS:
        there = scored[kind] > 0
        chosen = {name: of_model[there] for name, of_model in sums[kind].items()}
        scores = Scores(list(labels[there]), scored[kind][there], chosen)
        for record in records(scores, 10_000, 0, [("fused", "clm")]):
            called = {"clm": "CLM", "fused": "fused", "fused-clm": "difference"}[record.model]
            figures[f"{called} {kind} {record.task}"] = record.value
            if called == "difference" and record.low is not None and record.high is not None:
                figures[f"low {kind} {record.task}"] = record.low
                figures[f"high {kind} {record.task}"] = record.high
    return figures


def main() -> None:
    """Compare the two kinds of text of a run."""
    parser = command_line(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run that is done")
    parser.add_argument("--window", type=int, default=32, help="bytes (%(default)s)")
    given = parser.parse_args()
    if not given.quick and given.run is None:
        parser.error("name a run that is done with --run, or give --quick")
    with tempfile.TemporaryDirectory() as place:
        run = given.run or made(Path(place))
        show(measured(run, given.window), given.json, ".4f")


if __name__ == "__main__":
    main()
