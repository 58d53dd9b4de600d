"""What survives the translation from a source's tokenizer to the target's, and what it is worth.

    python benchmarks/translation.py measure   log-loss of what is carried over, by situation
    python benchmarks/translation.py truth     its distance to continuations sampled from a source
    python benchmarks/translation.py training --out DIR   validation bits per byte after training

`measure` reads whole distributions of a zoo model over the validation part of the built-in corpus
and carries them by each strategy to another zoo model's tokenizer. In bits per byte of the true
next target token, at the positions that the strategy aligns:

    own       what the source itself gives these bytes, each token's bits spread over its bytes
    carried   what the carried-over distribution gives the outcome of the true next target token
    lost      what then still says which token of the outcome it is, by the target's unigram
              frequencies on the same text: a coarse partition carries few bits and loses many

Mass that a map sends nowhere counts as spread evenly over the target ids that got none.

`truth` continues the text from the source many times, cuts each continuation with the target's
tokenizer, and compares how often each next target token (and each outcome) came with what was
carried over. `noise` is the same distance between two halves of the continuations.

`training` continues the target on one domain with one source, λ = 0.5, by each strategy and by CLM
alone, over learning rates and seeds. `--quick` does little of each, `--json` prints one flat
object.
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from figures import command_line
from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import STRATEGIES
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.tokens import Tokens
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.config import ModelSettings
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.pipeline import Pipeline
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusellm.zoo.text import documents
from fusion_gain import QUICK, demo_recipe, validation, variant

_DOMAINS = ("prose", "python", "cpp")
_PAIRS = (("python", "prose"), ("cpp", "prose"), ("prose", "python"))
_RATES = ("1.0e-4", "5.0e-4", "2.0e-3")


@dataclass(frozen=True)
class Model:
    """A zoo model and its tokenizer."""

    name: str
    encoder: Encoder
    network: PreTrainedModel

    @classmethod
    def load(cls, name: str) -> "Model":
        located = locate(ModelSettings(model=f"zoo/{name}"))
        network = load_model(located, torch.device("cpu"), torch.float32).eval()
        return cls(name, Encoder(load_tokenizer(located)), network)

    @torch.no_grad()
    def log_probs(self, ids: np.ndarray) -> torch.Tensor:
        """[T, V] of one block."""
        hidden = hidden_states(self.network, input_ids=torch.from_numpy(ids)[None])[0]
        return torch.log_softmax(head_of(self.network).logits(hidden), dim=-1)

    def tokens(self, text: str, last: bool = False) -> Tokens | None:
        (block,) = self.encoder.encode([text], [last])
        if block.ends is None:
            return None
        return Tokens(np.array([0, len(block.ids)]), block.ids, block.ends)


def blocks_of(domain: str, most_bytes: int) -> list[str]:
    """Text of the validation part: the beginnings of documents."""
    found, size = [], 0
    for document in documents(("validation",), (domain,)):
        text = next(cut(document.text, 1024))
        found.append(text)
        size += len(text.encode())
        if size >= most_bytes:
            break
    return found


# measure


def carried_masses(log_p: torch.Tensor, translation: VocabularyMap) -> torch.Tensor:
    """[N, U+1] mass of each outcome; the last column is what has none."""
    outcome = torch.from_numpy(
        np.where(
            translation.outcome_of_source < 0,
            translation.outcomes,
            translation.outcome_of_source,
        )
    )
    rows = log_p.new_zeros(len(log_p), translation.outcomes + 1)
    return rows.index_add_(1, outcome, torch.exp(log_p[:, : len(outcome)]))


def true_bits(log_p: torch.Tensor, translation: VocabularyMap, true_ids: np.ndarray) -> np.ndarray:
    """[N] bits of the outcome of each true next target token."""
    masses = carried_masses(log_p, translation).double()
    outcome = torch.from_numpy(translation.outcome_of_target[true_ids])
    rows = torch.arange(len(outcome))
    mass = masses[rows, torch.where(outcome < 0, translation.outcomes, outcome)]
    if not translation.complete:
        got_none = (masses[:, :-1] == 0).sum(1)
        mass = torch.where(mass > 0, mass, masses[:, -1] / got_none.clamp(min=1))
    return np.asarray(-torch.log2(mass.clamp(min=1e-12)))


def own_bits(log_p: torch.Tensor, tokens: Tokens, spans: np.ndarray) -> np.ndarray:
    """[N] bits of the source over byte spans [N, 2], each token's spread over its bytes."""
    true = -log_p[torch.arange(len(log_p) - 1), torch.from_numpy(tokens.ids[1:])].numpy()
    ends, lengths = tokens.ends, np.diff(tokens.ends)
    by_byte = np.zeros(int(ends[-1]))
    for n in np.nonzero(lengths)[0]:
        by_byte[ends[n] : ends[n + 1]] = true[n] / lengths[n] / math.log(2)
    sums = np.concatenate([[0.0], np.cumsum(by_byte)])
    return np.asarray(sums[spans[:, 1]] - sums[spans[:, 0]])


def measure(source: Model, target: Model, most_bytes: int) -> Iterator[dict[str, object]]:
    """Rows of figures by domain, strategy and situation."""
    for domain in _DOMAINS:
        texts = blocks_of(domain, most_bytes)
        pairs = [(source.tokens(text), target.tokens(text)) for text in texts]
        read = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
        distributions = [source.log_probs(mine.ids) for mine, _ in read]
        ids = np.concatenate([theirs.ids for _, theirs in read])
        frequency = np.bincount(ids, minlength=len(target.encoder.vocabulary)) + 0.1
        for name, strategy in STRATEGIES.items():
            translation = strategy.translate(source.encoder, target.encoder, None)
            align = strategy.aligner(source.encoder, target.encoder, translation)
            found = []
            for (mine, theirs), log_p in zip(read, distributions, strict=True):
                aligned = align(theirs, mine)
                spans = np.stack([theirs.ends[:-1], theirs.ends[1:]], axis=1)
                at = np.nonzero((aligned.source >= 0) & (spans[:, 1] > spans[:, 0]))[0]
                true_ids = theirs.ids[1:][at]
                carried = true_bits(log_p[aligned.source[at]], translation, true_ids)
                own = own_bits(log_p, mine, spans[at])
                lost = _bits_within(translation, frequency, true_ids)
                sizes = spans[at, 1] - spans[at, 0]
                found.append(np.stack([aligned.situations[at], sizes, own, carried, lost]))
            positions = sum(len(theirs.ids) - 1 for _, theirs in read)
            yield from _rows(domain, name, np.concatenate(found, axis=1), positions)


def _bits_within(translation: VocabularyMap, frequency: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[N] bits that say which member of its outcome a target token is."""
    outcome = np.where(
        translation.outcome_of_target < 0, translation.outcomes, translation.outcome_of_target
    )
    whole = np.bincount(outcome, weights=frequency[: len(outcome)])
    return np.asarray(np.log2(whole[outcome[ids]] / frequency[ids]))


def _rows(
    domain: str, strategy: str, found: np.ndarray, positions: int
) -> Iterator[dict[str, object]]:
    groups = {"all": np.ones(found.shape[1], bool)} | {
        s.name.lower(): found[0] == s for s in Situation if (found[0] == s).any()
    }
    for situation, mine in groups.items():
        size = found[1, mine].sum()
        yield {
            "domain": domain,
            "strategy": strategy,
            "situation": situation,
            "share": mine.sum() / positions,
            "own": found[2, mine].sum() / size,
            "carried": found[3, mine].sum() / size,
            "lost": found[4, mine].sum() / size,
        }


# truth


@torch.no_grad()
def continuations(source: Model, ids: np.ndarray, count: int, steps: int) -> list[list[int]]:
    """Sampled token ids after a prefix."""
    found = source.network(torch.from_numpy(ids)[None], use_cache=True)
    cache, logits = found.past_key_values, found.logits[:, -1].expand(count, -1)
    cache.batch_repeat_interleave(count)
    drawn = []
    for step in range(steps):
        drawn.append(torch.multinomial(torch.softmax(logits, -1), 1))
        if step < steps - 1:
            found = source.network(drawn[-1], past_key_values=cache, use_cache=True)
            logits = found.logits[:, -1]
    return torch.cat(drawn, dim=1).tolist()


def truth(
    source: Model, target: Model, positions: int, samples: int, seed: int
) -> dict[str, float]:
    """Mean total variation between what is carried over and what really follows, by strategy."""
    chance = np.random.default_rng(seed)
    torch.manual_seed(seed)
    eos, names = source.encoder.vocabulary.eos_id, list(STRATEGIES)
    made = {n: s.translate(source.encoder, target.encoder, None) for n, s in STRATEGIES.items()}
    distances: dict[str, list[float]] = {f"{n}_{k}": [] for n in names for k in ("tv", "noise")}
    texts = [text for domain in _DOMAINS for text in blocks_of(domain, 12_000)]
    while len(distances["partition_tv"]) < positions:
        text = texts[chance.integers(len(texts))]
        mine, theirs = source.tokens(text), target.tokens(text)
        if mine is None or theirs is None:
            continue
        align = STRATEGIES["partition"].aligner(source.encoder, target.encoder, made["partition"])
        aligned = align(theirs, mine).source
        at = [n for n in np.nonzero(aligned >= 0)[0] if 20 < theirs.ends[n] < theirs.ends[-1]]
        if not at:
            continue
        n = int(chance.choice(at))
        begin, j = int(theirs.ends[n]), int(aligned[n])
        drawn = continuations(source, mine.ids[: j + 1], samples, 4)
        following = _next_ids(source, target, text.encode()[:begin], drawn, eos)
        if len(following) < samples * 0.9:
            continue  # the prefix is cut otherwise once something follows it
        log_p = source.log_probs(mine.ids[: j + 1])[-1:]
        for name in names:
            translation = made[name]
            expected = carried_masses(log_p, translation)[0].numpy()
            outcome = translation.outcome_of_target[following]
            outcome = np.where(outcome < 0, translation.outcomes, outcome)
            distances[f"{name}_tv"].append(_variation(outcome, expected))
            halves = outcome[::2], outcome[1::2]
            other = np.bincount(halves[1], minlength=len(expected)) / len(halves[1])
            distances[f"{name}_noise"].append(_variation(halves[0], other))
    return {name: float(np.mean(found)) for name, found in distances.items()}


def _variation(outcome: np.ndarray, expected: np.ndarray) -> float:
    found = np.bincount(outcome, minlength=len(expected)) / len(outcome)
    return float(np.abs(found - expected).sum() / 2)


def _next_ids(
    source: Model, target: Model, before: bytes, drawn: Sequence[Sequence[int]], eos: int | None
) -> np.ndarray:
    """The target's first token of each continuation, where it can be told."""
    known = source.encoder.vocabulary.token_bytes
    texts = []
    for ids in drawn:
        after = b"".join(
            known[id_] or b"" for id_ in (ids[: ids.index(eos)] if eos in ids else ids)
        )
        texts.append((before + after).decode("utf-8", "ignore"))
    found = []
    for block, text in zip(target.encoder.encode(texts, [False] * len(texts)), texts, strict=True):
        if block.ends is None or len(text.encode()) <= len(before):
            continue
        at = int(np.searchsorted(block.ends, len(before), side="right"))
        if at < len(block.ends) and at > 0 and block.ends[at - 1] == len(before):
            found.append(int(block.ids[at]))
    return np.array(found, dtype=np.int64)


# training


def training(
    out: Path, quick: bool, seeds: int, changes: Sequence[str], names: Sequence[str]
) -> dict[str, float]:
    """Validation bits per byte of the Python domain, by strategy, rate and seed."""
    common = [
        "sources=[{name: python, model: zoo/python}]",
        *(
            QUICK
            if quick
            else [
                "corpus.documents=[{builtin: python}]",
                "corpus.train_bytes=800000",
                "corpus.held_out_bytes=5000",
                "corpus.validation_bytes=100000",
            ]
        ),
        "objective.lambda=0.5",
        "training.clm={}",
        "training.num_train_epochs=1",
        "training.validations=1",
        *changes,
    ]
    base = out / "base"
    whole = Pipeline(demo_recipe(common), base, Terminal(SafeConsole(stderr=True)))
    whole.execute(["corpus", "externalize"])
    figures: dict[str, float] = {}
    best = {}
    for name in names:
        for rate in _RATES[:1] if quick else _RATES:
            figures[f"{name} lr={rate} seed=0"] = _train(out, base, common, name, rate, 0)
        best[name] = min(
            _RATES[:1] if quick else _RATES, key=lambda r: figures[f"{name} lr={r} seed=0"]
        )
        for seed in range(1, 1 if quick else seeds):
            key = f"{name} lr={best[name]} seed={seed}"
            figures[key] = _train(out, base, common, name, best[name], seed)
    for name in names:
        found = [v for k, v in figures.items() if k.startswith(f"{name} lr={best[name]} ")]
        figures[f"{name}_mean"] = statistics.mean(found)
        figures[f"{name}_deviation"] = statistics.stdev(found) if len(found) > 1 else math.nan
    return figures


def _train(out: Path, base: Path, common: list[str], name: str, rate: str, seed: int) -> float:
    run = out / f"{name}-{rate}-{seed}"
    chosen = [] if name == "clm" else [f"fusion.strategy={name}"]
    settings = [*common, *chosen, f"training.learning_rate={rate}", f"training.seed={seed}"]
    pipeline = variant(base, run, demo_recipe(settings))
    which = "clm" if name == "clm" else "fused"
    pipeline.execute([f"train/{which}"] if name == "clm" else ["fuse", f"train/{which}"])
    return validation(run, which)


def main() -> None:
    """Run one of the three studies."""
    parser = command_line(__doc__)
    parser.add_argument("study", choices=["measure", "truth", "training"])
    parser.add_argument("--out", type=Path, help="folder for the runs (training)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["clm", *STRATEGIES], help="training: these")
    arguments = parser.parse_args()
    quick = arguments.quick
    figures: dict[str, float] = {}
    if arguments.study == "training":
        if arguments.out is None:
            parser.error("training needs --out")
        names = arguments.only or ["clm", *STRATEGIES]
        figures = training(arguments.out, quick, arguments.seeds, arguments.set, names)
    for name, target_name in [] if arguments.study == "training" else _PAIRS[: 1 if quick else 3]:
        source, target = Model.load(name), Model.load(target_name)
        pair = f"{target_name}<-{name}"
        if arguments.study == "truth":
            found = truth(source, target, 5 if quick else 200, 64 if quick else 512, seed=0)
            figures |= {f"{pair} {key}": value for key, value in found.items()}
            continue
        rows = list(measure(source, target, 3_000 if quick else 40_000))
        for row in rows:
            place = f"{pair} {row['domain']} {row['strategy']} {row['situation']}"
            figures |= {
                f"{place} {key}": float(str(row[key]))
                for key in ("share", "own", "carried", "lost")
            }
        if not arguments.json:
            _print(pair, rows)
    if arguments.json:
        print(json.dumps(figures))
    elif arguments.study != "measure":
        for key, value in figures.items():
            print(f"{key:<44} {value:.4f}")


def _print(pair: str, rows: Sequence[dict[str, object]]) -> None:
    table = Table(title=pair)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
