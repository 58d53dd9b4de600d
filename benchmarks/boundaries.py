"""Where fusion loses: at the target's boundaries that a source's tokens span.

    python benchmarks/boundaries.py --run RUN [--source NAME]

A source says what comes after a boundary of its own. Where `;` and a line end are one token to it,
it has a boundary after `;` only where no line end follows, and says there that none does. The
target has its boundary after every `;`. Taught at the boundaries that both have, it learns that
after `;` hardly any line ends; where one does, the source has no boundary, and says nothing.

Over the held-out text of a finished run, by domain and by what comes next, for the target's
boundaries that the source shares, and for those that its tokens span:

    boundaries …   share of the target's boundaries
    shared …       share of them that the source has too
    cost MODEL …   of the target's tokens that begin there, in bits per byte of the domain's text,
                   so that the rows of a domain add up; of sources too, whose tokens' nats are
                   spread evenly over their bytes
    difference …   fused − CLM of the same; 95 % interval over documents

And over every sixth block of the training text, as long as its distributions are kept, at the
target's boundaries after punctuation:

    text …         share of them that a line end follows
    said …         mass that the source gives a line end, where it has the boundary too
    answered …     the same, asked of its token before as well, as token healing does (see `add`);
                   `asked …` is the share of boundaries where it can be, `text where asked …` what
                   the text has there
    nats …         of whether a line ends, by what is said (nothing is 0) and by what is answered

`--quick` makes a small run of the zoo; `--json` prints the figures as one object.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from figures import command_line, show
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.text.intervals import Scores, records
from fusellm.models.readers import readers_of
from fusellm.pipeline import Pipeline
from fusellm.recipe_file import load_recipe
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.externalized import TARGET, externalized_folder
from fusellm.store.manifest import StageFolder
from fusellm.store.measured import NATS
from fusellm.store.opened import StoredBlock, open_store
from fusellm.store.tables import Shard
from fusellm.tokens.encode import Encoder
from fusion_gain import QUICK, demo_recipe

_MODELS = ("clm", "fused")
_KINDS = ("a line end", "other text")
_HAD = {True: "shared", False: "spanned"}
_LINE_END = ord("\n")
_PUNCTUATION = b";,.:){}"
_EVERY = 6  # blocks
_HALF_A_DRAW = 1 / 64


def nats_of(run: Path, name: str) -> list[np.ndarray]:
    """Each held-out block's nats by byte under a model."""
    shard = Shard(StageFolder(run / "evaluate"), f"{name}.arrow", NATS)
    return [shard.block(n)["nats"].astype(np.float64) for n in range(len(shard))]


def places(
    blocks: list[Block], target: Encoder, source: Encoder
) -> Iterator[tuple[int, int, int, str, bool]]:
    """(block, first byte, end, what it begins with, whether the source has a boundary there).

    Of each of the target's tokens but a block's first.
    """
    texts, last = [block.text for block in blocks], [block.last for block in blocks]
    read = zip(target.encode(texts, last), source.encode(texts, last), strict=True)
    for n, (mine, theirs) in enumerate(read):
        if mine.ends is None or theirs.ends is None:
            continue
        raw, shared = texts[n].encode(), {int(end) for end in theirs.ends}
        for first, end in zip(mine.ends[:-1].tolist(), mine.ends[1:].tolist(), strict=True):
            if 0 < first < end:
                kind = _KINDS[raw[first] != _LINE_END]
                yield n, first, end, kind, first in shared


def measured(run: Path, source: str) -> dict[str, float]:
    """The figures of a run."""
    readers = readers_of(load_recipe(run / "recipe.yaml", []))
    blocks = list(read_part(open_corpus(run), "held_out"))
    names = [*_MODELS, *readers]
    nats = {name: nats_of(run, name) for name in names}
    number: dict[tuple[str, str], int] = {}
    of_block = [number.setdefault((b.domain, b.document), len(number)) for b in blocks]
    scored_bytes = np.zeros(len(number), dtype=np.int64)
    for document, row in zip(of_block, nats["clm"], strict=True):
        scored_bytes[document] += int(np.isfinite(row).sum())
    sums = {
        (kind, had, name): np.zeros(len(number))
        for kind in _KINDS
        for had in _HAD.values()
        for name in names
    }
    counts: Counter[tuple[str, str, str]] = Counter()
    encoders = readers[TARGET].encoder, readers[source].encoder
    for n, first, end, kind, shared in places(blocks, *encoders):
        counts[blocks[n].domain, kind, _HAD[shared]] += 1
        for name in names:
            sums[kind, _HAD[shared], name][of_block[n]] += np.nansum(nats[name][n][first:end])
    domains = [domain for domain, _ in number]
    figures: dict[str, float] = {}
    for domain in dict.fromkeys(domains):
        boundaries = sum(counts[domain, kind, had] for kind in _KINDS for had in _HAD.values())
        for kind in _KINDS:
            mine = {had: counts[domain, kind, had] for had in _HAD.values()}
            of_kind = sum(mine.values())
            figures[f"boundaries {domain}, {kind} next"] = of_kind / max(boundaries, 1)
            figures[f"shared {domain}, {kind} next"] = mine[_HAD[True]] / max(of_kind, 1)
    for kind in _KINDS:
        for had in _HAD.values():
            scores = Scores(domains, scored_bytes, {name: sums[kind, had, name] for name in names})
            for record in records(scores, 10_000, 0, [("fused", "clm")]):
                where = f"{record.task}, {kind} next, {had}"
                if record.task != MEAN and record.model in names:
                    figures[f"cost {record.model} {where}"] = record.value
                elif record.task != MEAN:
                    place = f"difference {where}"
                    figures[place] = record.value
                    if record.low is not None and record.high is not None:
                        figures |= {f"{place} low": record.low, f"{place} high": record.high}
    return figures


@dataclass
class Asked:
    """Sums over the target's boundaries after punctuation, of a domain."""

    places: int = 0
    line_ends: int = 0
    shared: int = 0
    said: float = 0.0
    asked: int = 0
    answered: float = 0.0
    asked_line_ends: int = 0
    nats_said: float = 0.0
    nats_answered: float = 0.0

    def figures(self, domain: str) -> dict[str, float]:
        """Means."""
        asked = max(self.asked, 1)
        return {
            f"text {domain}": self.line_ends / self.places,
            f"said {domain}": self.said / max(self.shared, 1),
            f"asked {domain}": self.asked / self.places,
            f"answered {domain}": self.answered / asked,
            f"text where asked {domain}": self.asked_line_ends / asked,
            f"nats said {domain}": self.nats_said / asked,
            f"nats answered {domain}": self.nats_answered / asked,
        }


def after_punctuation(run: Path, source: str) -> dict[str, float]:
    """What the source says of line ends after punctuation, and what the text has there."""
    readers = readers_of(load_recipe(run / "recipe.yaml", []))
    target, spelled = readers[TARGET].encoder, readers[source].encoder.vocabulary.token_bytes
    blocks = {block.number: block for block in read_part(open_corpus(run), "train")}
    found: dict[str, Asked] = {}
    for n, read in enumerate(open_store(externalized_folder(run, source))):
        if n % _EVERY:
            continue
        block = blocks[read.number]
        (mine,) = target.encode([block.text], [block.last])
        if mine.ends is not None:
            sums = found.setdefault(block.domain, Asked())
            add(sums, block.text.encode(), mine.ends.tolist(), read, spelled)
    return {k: v for domain, sums in found.items() for k, v in sums.figures(domain).items()}


def add(
    sums: Asked,
    raw: bytes,
    ends: list[int],
    read: StoredBlock,
    spelled: Sequence[bytes | None],
) -> None:
    """Add a block's boundaries: what the source says at them, and one boundary before them.

    Let a source's token before the boundary p begin at q, and w be the text between the two. At q
    it gave mass to w, and to longer tokens w + u. So the share of a line end at p is

        (P_q(w) P_p(line end) + sum of P_q(w + u) over u that begin with a line end)
        / sum of P_q(v) over all tokens v that begin with w.
    """
    kept, masses = read.kept, read.kept.masses()

    def tokens(position: int) -> list[tuple[bytes, float]]:
        rows = slice(*kept.offsets[position : position + 2].tolist())
        pairs = zip(kept.ids[rows].tolist(), masses[rows].tolist(), strict=True)
        return [(spelled[id_] or b"", mass) for id_, mass in pairs]

    def line_end(position: int) -> float:
        return sum(mass for token, mass in tokens(position) if token[:1] == b"\n")

    places = {int(end): n for n, end in enumerate(read.ends[:-1].tolist())}
    for p in ends:
        if not (0 < p < len(raw) and raw[p - 1] in _PUNCTUATION):
            continue
        truth = raw[p] == _LINE_END
        sums.places += 1
        sums.line_ends += truth
        said = line_end(places[p]) if p in places else 0.0
        if p in places:
            sums.shared += 1
            sums.said += said
        before = int(np.searchsorted(read.ends, p)) - 1
        if before < 0:
            continue
        w = raw[int(read.ends[before]) : p]
        fitting = [(token, mass) for token, mass in tokens(before) if token.startswith(w)]
        whole = sum(mass for _, mass in fitting)
        if whole <= 0:
            continue
        longer = sum(m for token, m in fitting if token[len(w) :][:1] == b"\n")
        exact = sum(m for token, m in fitting if token == w)
        answer = (exact * said + longer) / whole
        sums.asked += 1
        sums.asked_line_ends += truth
        sums.answered += answer
        sums.nats_said += nats(said, truth)
        sums.nats_answered += nats(answer, truth)


def nats(share: float, truth: bool) -> float:
    """What a yes or no costs; shares of draws are kept from 0 and 1 by half a draw."""
    share = min(max(share, _HALF_A_DRAW), 1 - _HALF_A_DRAW)
    return -math.log(share if truth else 1 - share)


def made(place: Path) -> Path:
    """A small run of the zoo."""
    run = place / "run"
    changes = [*QUICK, "training.max_steps=4", "corpus.held_out_bytes=40000"]
    stages = ["corpus", "externalize", "fuse", "train", "evaluate"]
    Pipeline(demo_recipe(changes), run, Terminal(SafeConsole(stderr=True))).execute(stages)
    return run


def main() -> None:
    """Compare the places of a run."""
    parser = command_line(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run that is done")
    parser.add_argument("--source", help="name of a source; the first if not given")
    given = parser.parse_args()
    if not given.quick and given.run is None:
        parser.error("name a run that is done with --run, or give --quick")
    with tempfile.TemporaryDirectory() as place:
        run = given.run or made(Path(place))
        names = [source.name for source in load_recipe(run / "recipe.yaml", []).sources]
        source = given.source or names[-1 if given.quick else 0]
        if source not in names:
            parser.error(f"--source {source}: the run has {', '.join(names)}")
        figures = measured(run, source)
        if externalized_folder(run, source).is_dir():
            figures |= after_punctuation(run, source)
        show(figures, given.json, ".4f")


if __name__ == "__main__":
    main()
