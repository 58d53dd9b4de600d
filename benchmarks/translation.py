"""What survives the translation from a source's tokenizer to the target's, and what it is worth.

    python benchmarks/translation.py measure   log-loss of what is carried over
    python benchmarks/translation.py digits    the same on numbers, where the target groups digits
    python benchmarks/translation.py truth     its distance to continuations sampled from a source
    python benchmarks/translation.py training --out DIR   validation bits per byte after training

An arm is settings of fusion (arms.py): `partition` with its classes whole and no token healing, as
`healed` with it, `path` (classes split along the text) without it, `refined`, the default, with
both, and the strategies `bytes`, `bpm`, `mined` and `em`. `--arm` takes some.

`measure` reads distributions of a model over text (tokens above e^-14, of vocabularies above 60,000
the 2,048 most probable, and the rest) and has the pipeline carry them to another tokenizer. In bits
per byte of the true next target token, at the positions that the arm aligns:

    own       what the source itself gives these bytes, each token's bits spread over its bytes
    carried   what the carried-over distribution gives the outcome of the true next target token
    lost      what then still says which token of the outcome it is, by the target's unigram
              frequencies on the same text: a coarse partition carries few bits and loses many
    gap       carried + lost - own

Mass that goes nowhere is of all ids without an outcome at the position: of classes as one more
outcome, of token-to-token maps spread evenly. Figures are by domain (the validation part of the
built-in corpus; `numbers` and `scripts` are made by rules), by situation and by kind of text of the
true next token (kinds_of_text.py); the share of a kind is of its own positions. Pairs are
TARGET<-SOURCE: sources are the zoo's models and those in `--models`, targets the tokenizers of
these and of `--tokenizers`. Without `--pair` three of the zoo's; `--every` takes all.

`digits` has GPT-NeoX's tokenizer as target (where it is not there, one made on the spot) and
zoo/prose and zoo/python, which spell digits singly, as sources, on text of numbers: `digits_own`,
`digits_carried` and `digits_lost` at true next tokens with a digit, and `whole_text_gap` at all of
them; and as `truth` does, at positions before a number or in one, `digits_tv_over_noise`.

`truth` continues the text from the source many times, cuts each continuation by the target's
tokenizer, and compares how often each token came first with what was carried over, averaged over
the continuations where it depends on the text. `noise` is the total variation between how often
tokens came in two halves of the sample. `tv` is between an arm's average over one half and how
often they came in the other, so that the two share no sample; an outcome of several tokens is
shared among them as often as they came in the arm's own half, `tv_resolved` as the arm itself has
them apart (sampled_truth.py). An exact arm whose average is as noisy as the frequencies has 1 over
the noise, one that averages better down to 0.7. Positions are aligned by boundaries for all arms.

`training` continues the target on one domain with one source, λ = 0.5, by each strategy and by CLM
alone, over learning rates and seeds.

`--quick` does little of each, `--json` prints one flat object, `--markdown FILE` writes the whole
tables of `measure`.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from arms import ARMS, TEXTS, Model, Places, Reader, blocks_of
from carried_bits import EVERYTHING, Row, measure
from figures import add_tokenizers, command_line, show
from fusellm.alignment.strategies import STRATEGIES
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.pipeline import Pipeline
from fusellm.tokens.encode import Encoder
from fusellm.zoo.text import DOMAINS, documents
from fusion_gain import QUICK, demo_recipe, validation, variant
from kinds_of_text import Kind
from number_text import number_documents
from rivals.grouped_digits import grouping_bpe
from sampled_truth import truth

_PAIRS = ("zoo/prose<-zoo/python", "zoo/prose<-zoo/cpp", "zoo/python<-zoo/prose")
_RATES = ("1.0e-4", "5.0e-4", "2.0e-3")
_GROUPED = "gpt-neox-20b"
_SINGLY = ("zoo/python", "zoo/prose")
_MADE_VOCABULARY = 4096
FIGURES = ("share", "own", "carried", "lost", "gap")


# measure


def two_of(pair: str) -> tuple[str, str]:
    """(target, source) of `TARGET<-SOURCE`."""
    target, _, source = pair.partition("<-")
    return target, source


def flat(pair: str, rows: Sequence[Row]) -> dict[str, float]:
    """Figures by their whole names."""
    return {
        f"{pair} {row['domain']} {row['arm']} {row['group']} {key}": float(row[key])
        for row in rows
        for key in FIGURES
    }


def print_compactly(pair: str, rows: Sequence[Row]) -> None:
    """Two tables: by domain, and by kind of text over all domains."""
    by_domain = Table(title=f"{pair}, by domain")
    for column in ("domain", "arm", *FIGURES):
        by_domain.add_column(column, justify="right" if column in FIGURES else "left")
    for row in rows:
        if row["group"] == EVERYTHING:
            figures = (f"{row[key]:.3f}" for key in FIGURES)
            by_domain.add_row(str(row["domain"]), str(row["arm"]), *figures)
    domain = rows[-1]["domain"]
    found = {(row["arm"], row["group"]): row for row in rows if row["domain"] == domain}
    by_kind = Table(title=f"{pair}, lost / gap by kind of text, domain {domain}")
    by_kind.add_column("arm")
    for kind in Kind:
        by_kind.add_column(kind.label.replace("_", " "), justify="right")
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = (found.get((arm, kind.label)) for kind in Kind)
        by_kind.add_row(
            str(arm), *(f"{row['lost']:.3f} {row['gap']:+.3f}" if row else "" for row in cells)
        )
    for table in (by_domain, by_kind):
        Console(width=120).print(table)


def as_markdown(pair: str, rows: Sequence[Row]) -> str:
    """All figures of a pair."""
    columns = ("domain", "arm", "group", "share", "bytes", "own", "carried", "lost", "gap")
    lines = [f"## {pair}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (
            value
            if isinstance(value, str)
            else f"{value:.0f}"
            if key == "bytes"
            else f"{value:.3f}"
            for key, value in ((key, row[key]) for key in columns)
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure_pairs(arguments: argparse.Namespace, places: Places) -> dict[str, float]:
    """The measure of each pair, printed and written as it comes."""
    pairs = arguments.pair or (list(places.pairs()) if arguments.every else _PAIRS)
    domains = arguments.domain or TEXTS
    most_bytes = arguments.bytes or (250 if arguments.quick else 20_000)
    figures: dict[str, float] = {}
    written = []
    for pair in pairs[:1] if arguments.quick and not arguments.pair else pairs:
        target, source = two_of(pair)
        read = places.source(source), places.target(target)
        rows = measure(*read, arguments.arm or list(ARMS), domains, most_bytes)
        figures |= flat(pair, rows)
        written.append(as_markdown(pair, rows))
        if arguments.markdown:
            arguments.markdown.write_text("\n".join(written))
        if not arguments.json:
            print_compactly(pair, rows)
    return figures


# truth


def grouped(places: Places) -> Reader:
    """GPT-NeoX's tokenizer, or one that groups digits as it does, made on the spot."""
    if _GROUPED in places.tokenizers:
        return places.target(_GROUPED)
    print(f"no {_GROUPED} in --tokenizers: one is trained on the spot", file=sys.stderr)
    texts = number_documents(3, 500)
    prose = (document.text for document in documents(("zoo",), ("prose",)))
    texts += [text for text, _ in zip(prose, range(100), strict=False)]
    texts += [" ".join(map(str, range(1000))) + ",".join(map(str, range(1000)))] * 10
    return Reader("grouped", Encoder(grouping_bpe(iter(texts), _MADE_VOCABULARY)))


def digits(arguments: argparse.Namespace, places: Places) -> dict[str, float]:
    """Figures of numbers, where the target groups digits and the sources do not."""
    target, names = grouped(places), arguments.arm or list(ARMS)
    quick = arguments.quick
    figures: dict[str, float] = {}
    most_bytes = arguments.bytes or (600 if quick else 20_000)
    asked = [two_of(pair)[1] for pair in arguments.pair or ()]
    for source_name in asked or _SINGLY[: 1 if quick else 2]:
        source = places.source(source_name)
        pair = f"{target.name}<-{source_name}"
        for row in measure(source, target, names, ("numbers",), most_bytes):
            if row["group"] == Kind.DIGITS.label:
                for key in FIGURES:
                    figures[f"{pair} {row['arm']} digits_{key}"] = float(row[key])
            elif row["group"] == EVERYTHING:
                figures[f"{pair} {row['arm']} whole_text_gap"] = float(row["gap"])
        count, samples = (2, 64) if quick else (arguments.positions or 40, 512)
        texts = blocks_of("numbers", 12_000)
        found = truth(source, target, names, texts, count, samples, numbers_only=True)
        figures |= {f"{pair} {place_of(key)}": value for key, value in found.items()}
        print(f"{pair}: measured", file=sys.stderr)
    return figures


def place_of(key: str) -> str:
    """`arm tv` as `arm digits_tv`."""
    *arm, figure = key.split(" ")
    return " ".join((*arm, f"digits_{figure}"))


def truth_of_pairs(arguments: argparse.Namespace, places: Places) -> dict[str, float]:
    """Distances by pair."""
    quick = arguments.quick
    figures: dict[str, float] = {}
    pairs = arguments.pair or _PAIRS[: 1 if quick else 3]
    count, samples = (2, 64) if quick else (arguments.positions or 100, 512)
    for pair in pairs:
        target_name, source_name = two_of(pair)
        read: tuple[Model, Reader] = places.source(source_name), places.target(target_name)
        texts = [
            text for domain in arguments.domain or DOMAINS for text in blocks_of(domain, 12_000)
        ]
        found = truth(*read, arguments.arm or list(ARMS), texts, count, samples, numbers_only=False)
        figures |= {f"{pair} {key}": value for key, value in found.items()}
    return figures


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


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("study", choices=["measure", "digits", "truth", "training"])
    add_tokenizers(parser)
    parser.add_argument("--models", type=Path, metavar="DIR", help="a folder of models")
    parser.add_argument("--pair", action="append", metavar="TARGET<-SOURCE")
    parser.add_argument("--every", action="store_true", help="measure: all pairs there are")
    parser.add_argument("--domain", action="append", choices=TEXTS)
    parser.add_argument("--arm", action="append", choices=list(ARMS))
    parser.add_argument("--bytes", type=int, help="measure and digits: of each domain")
    parser.add_argument("--positions", type=int, help="digits and truth: where it is sampled")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure: whole tables")
    parser.add_argument("--out", type=Path, help="folder for the runs (training)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["clm", *STRATEGIES], help="training: these")
    arguments = parser.parse_args()
    if arguments.study == "training" and arguments.out is None:
        parser.error("training needs --out")
    places = Places.of(arguments.models, arguments.tokenizers)
    for pair in arguments.pair or ():
        target, source = two_of(pair)
        if source not in places.models or target not in {*places.models, *places.tokenizers}:
            known = ", ".join((*places.models, *places.tokenizers))
            parser.error(f"--pair {pair}: not TARGET<-SOURCE of what there is: {known}")
    return arguments


def main() -> None:
    """Run one of the studies."""
    arguments = arguments_of()
    places = Places.of(arguments.models, arguments.tokenizers)
    if arguments.study == "training":
        names = arguments.only or ["clm", *STRATEGIES]
        given = arguments.out, arguments.quick, arguments.seeds, arguments.set, names
        show(training(*given), arguments.json, ".4f")
    elif arguments.study == "measure":
        figures = measure_pairs(arguments, places)
        if arguments.json:
            show(figures, as_json=True)
    else:
        study = digits if arguments.study == "digits" else truth_of_pairs
        show(study(arguments, places), arguments.json, ".4f")


if __name__ == "__main__":
    main()
