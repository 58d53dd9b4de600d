"""What strategies and the rivals' losses are worth in training, on bytes of digits and the rest.

    python benchmarks/rivals_training.py digits --out DIR   numbers: a target with grouped digits
    python benchmarks/rivals_training.py real --out DIR --set target.model=M/smollm2 \\
        --set sources.0.model=M/qwen-coder                  Python: real language models

An arm is a strategy of fusellm with a run's changes of the recipe, or a rival's loss
(benchmarks/rivals) on the same rows, in the same order, by the same optimizer; λ = 0.5 in all of
them, and `clm` is the control. One whose settings this fusellm does not know is left out with a
line. `--only` takes some; `projection-means` and `hybrid-jsd`, which are other readings of two
papers, are trained only if they are named. `--arm NAME:KEY=VALUE,…` adds one.

`digits` makes a fourth small model (rivals/grouped_digits.py) and continues it on Python code with
many digits and on text of numbers. Its source is zoo/python, first taught on more of both (on text
of numbers zoo/python knows less than any target that has seen some); `--source zoo/python` takes it
as it is. Each arm over three learning rates with seed 0, then the best rate, by the validation
text, with three seeds.

`real` screens all arms at one rate on 50,000 tokens; then CLM and the best three, by the validation
text, have two seeds on 100,000.

Every training is a folder, DIR/STUDY/ARM-RATE-SEED-…, with figures.json once it is done; what is
done is never done again, and a training that was interrupted goes on from its last checkpoint.
Figures are of held-out documents that none of the trainings has read; DIR/STUDY/table.md has them
with 95 % intervals over documents of the differences from CLM and from
`partition`. A token's bits are spread over its
bytes, so that the space of ` 201` counts as rest.

`--quick` does both with next to no text, in a temporary folder if no --out is given; `--json`
prints one flat object.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from figures import command_line, show
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.config import ModelSettings, Recipe
from fusellm.errors import RecipeError
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.text.intervals import Record, Scores, records
from fusellm.evaluation.text.nats import blocks_nats
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.models.load import default_device, load_model, locate
from fusellm.models.readers import encoder_of
from fusellm.pipeline import Pipeline
from fusellm.recipe_file import load_recipe
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.files import write_text
from fusellm.store.run_folder import CLM, FUSED, trained_folder
from fusellm.tokens.blocks import cut
from fusellm.zoo.text import Document, documents, drop_near_duplicates
from fusion_gain import QUICK, variant
from rivals.grouped_digits import make, numbers_of
from rivals.trainer import RIVALS, train_rival

_ROOT = Path(__file__).parent.parent
_DEMO = _ROOT / "recipes" / "demo-full.yaml"
_SMALL = _ROOT / "src" / "fusellm" / "recipes" / "small.yaml"
_RATES = ("1.0e-4", "5.0e-4", "2.0e-3")
_VALIDATION, _HELD_OUT = "validation", "held_out"
_COMPARED_WITH = (CLM, "partition")
_TAUGHT = "taught"
_DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)
_LEAST_DIGITS = 0.04  # of a block of Python that counts as having many
_NOT_SCORED_BYTES = 32  # of a block, whose first token not all models predict
_SEEDS_OF_NUMBERS = {"train": 10, _VALIDATION: 11, _HELD_OUT: 12, "source": 13}
_TEXT_BYTES = {  # of either domain
    "train": 400_000,
    _VALIDATION: 60_000,
    _HELD_OUT: 120_000,
    "source": 700_000,
}
_PARTS = {"source": "zoo"}
"""Of the built-in corpus, for what is no part of it."""


@dataclass(frozen=True)
class Arm:
    """A way to train: a strategy by its changes of the recipe, a rival's loss, or CLM."""

    name: str
    changes: tuple[str, ...] = ()

    @property
    def which(self) -> str:
        """Name of the folder of the model that is trained."""
        return self.name if self.name in RIVALS or self.name == CLM else FUSED


ARMS = (
    Arm(CLM),
    Arm("partition", ("fusion.strategy=partition", "fusion.refine=none")),
    *(Arm(name, (f"fusion.strategy={name}",)) for name in ("bytes", "em", "mined")),
    Arm("path", ("fusion.strategy=partition", "fusion.refine=path")),
    Arm("bpm", ("fusion.strategy=bpm",)),
    *(Arm(name) for name in RIVALS),
)
ONLY_IF_NAMED = ("projection-means", "hybrid-jsd")
"""Other readings of two papers (benchmarks/rivals)."""
QUICK_ARMS = {
    "digits": (CLM, "partition", "projection", "span"),
    "real": (CLM, "hybrid"),
}


@dataclass(frozen=True)
class Held:
    """Documents that are measured on: (domain, text)."""

    name: str
    documents: Sequence[tuple[str, str]]


@dataclass
class Study:
    """Trainings of one target from one source, which is read once for all strategies."""

    out: Path
    recipe_file: Path
    changes: Sequence[str]
    held: Callable[["Study"], Sequence[Held]]
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.out / "base"
        self._held: Sequence[Held] | None = None

    def recipe(self, changes: Sequence[str] = ()) -> Recipe:
        """The recipe with an arm's changes."""
        return load_recipe(self.recipe_file, [*self.changes, *changes])

    def read(self) -> None:
        """Cut the corpus and read the source; of other settings than before nothing is mixed in."""
        settings = json.dumps([c.replace(str(self.out.resolve()), "") for c in self.changes])
        file = self.out / "settings.json"
        if file.exists() and file.read_text(encoding="utf-8") != settings:
            sys.exit(f"{self.out} has trainings by other settings ({file}); give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(file, settings)
        Pipeline(self.recipe(), self.base, terminal()).execute(["corpus", "externalize"])

    @property
    def texts(self) -> Sequence[Held]:
        """What is measured on."""
        if self._held is None:
            self._held = self.held(self)
        return self._held

    def known(self, arms: Sequence[Arm]) -> list[Arm]:
        """The arms whose settings there are."""
        kept = []
        for arm in arms:
            try:
                self.recipe(arm.changes)
            except RecipeError as error:
                terminal().say(f"{arm.name} is left out: {error}")
            else:
                kept.append(arm)
        return kept

    def unit(self, arm: Arm, rate: str, seed: int, more: Sequence[str] = ()) -> "Unit":
        """Train an arm and measure it, or find that done."""
        steps = [change.rpartition("=")[2] for change in more]
        name = "-".join([arm.name, rate, str(seed), *steps])
        unit = Unit(name, arm, self.out / name)
        if not unit.done:
            settings = [f"training.learning_rate={rate}", f"training.seed={seed}", *more]
            recipe = self.recipe([*arm.changes, *settings])
            began = time.perf_counter()
            model = self._train(unit, recipe)
            seconds = time.perf_counter() - began
            measure(recipe.target.model_copy(update={"model": str(model)}), recipe, unit, self)
            unit.finish({"seconds": seconds, "rate": float(rate), "seed": seed})
        self.figures[f"{name} {_VALIDATION}"] = unit.bits(_VALIDATION)
        self.figures[f"{name} seconds"] = unit.figures()["seconds"]
        return unit

    def _train(self, unit: "Unit", recipe: Recipe) -> Path:
        pipeline = variant(self.base, unit.folder, recipe)
        which = unit.arm.which
        if which in RIVALS:
            return train_rival(recipe, unit.folder, which, terminal())
        pipeline.execute([f"train/{CLM}"] if which == CLM else ["fuse", f"train/{which}"])
        return trained_folder(unit.folder, which)

    def untrained(self, name: str, settings: ModelSettings) -> "Unit":
        """The target before, or the source."""
        unit = Unit(name, Arm(name), self.out / name)
        if not unit.done:
            unit.folder.mkdir(parents=True, exist_ok=True)
            measure(settings, self.recipe(), unit, self)
            unit.finish({})
        return unit


@dataclass(frozen=True)
class Unit:
    """One training: a folder, with nats by document and figures once it is done."""

    name: str
    arm: Arm
    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "figures.json"

    @property
    def done(self) -> bool:
        """Whether it is trained and measured."""
        return self._file.exists()

    def figures(self) -> dict[str, float]:
        """What was written once it was done."""
        found: dict[str, float] = json.loads(self._file.read_text(encoding="utf-8"))
        return found

    def sums(self, held: str) -> np.ndarray:
        """[D, 2, 2] of each document, of digits and of the rest: nats and scored bytes."""
        array: np.ndarray = np.load(self.folder / f"{held}.npy", allow_pickle=False)
        return array

    def bits(self, held: str) -> float:
        """Bits per byte over all bytes."""
        nats, scored = self.sums(held).sum(axis=(0, 1)).tolist()
        return float(nats / scored / NATS_PER_BIT)

    def finish(self, figures: Mapping[str, float]) -> None:
        """Write figures, and keep of the training no more than its log."""
        whole = dict(figures) | {f"{h}_bits": self.bits(h) for h in (_VALIDATION, _HELD_OUT)}
        for name in ("corpus", "externalize", "fuse"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for weights in self.folder.rglob("*.safetensors"):
            weights.unlink()
        write_text(self._file, json.dumps(whole, indent=1) + "\n")


def terminal() -> Terminal:
    """Where progress is shown."""
    return Terminal(SafeConsole(stderr=True))


def measure(settings: ModelSettings, recipe: Recipe, unit: Unit, study: Study) -> None:
    """Write a model's nats over digits and the rest of each document."""
    located = locate(settings)
    encoder = encoder_of(located)
    model = load_model(located, default_device())
    for held in study.texts:
        pieces = [list(cut(text, recipe.corpus.block_bytes)) for _, text in held.documents]
        flat = [piece for document in pieces for piece in document]
        last = [n + 1 == len(d) for d in pieces for n in range(len(d))]
        sizes = [len(piece.encode()) for piece in flat]
        with terminal().start(f"{held.name}: {unit.name}", len(flat), "blocks") as bar:
            encoded = encoder.encode(flat, last)
            nats = blocks_nats(model, encoded, sizes, None, bar.advance)
        sums = np.zeros((len(pieces), 2, 2))
        owners = [n for n, document in enumerate(pieces) for _ in document]
        for owner, piece, row in zip(owners, flat, nats, strict=True):
            if row is not None:
                row[:_NOT_SCORED_BYTES] = np.nan
                sums[owner] += digits_and_rest(piece, row)
        np.save(unit.folder / f"{held.name}.npy", sums)


def digits_and_rest(text: str, nats: np.ndarray) -> np.ndarray:
    """[2, 2] nats and scored bytes of digits and of the rest.

    >>> digits_and_rest("a 1", np.array([np.nan, 2.0, 3.0])).tolist()
    [[3.0, 1.0], [2.0, 1.0]]
    """
    is_digit = np.isin(np.frombuffer(text.encode(), dtype=np.uint8), _DIGITS)
    scored = np.isfinite(nats)
    return np.array(
        [[nats[scored & kind].sum(), (scored & kind).sum()] for kind in (is_digit, ~is_digit)]
    )


# digits


def digit_rich(parts: Sequence[str], most_bytes: int, quick: bool) -> list[Document]:
    """Pieces of the built-in Python that have many digits."""
    found: list[Document] = []
    left = most_bytes
    source = documents(parts, ("python",))
    for document in islice(source, 60) if quick else source:
        for n, piece in enumerate(cut(document.text, 1024)):
            data = np.frombuffer(piece.encode(), dtype=np.uint8)
            if len(data) >= 200 and np.isin(data, _DIGITS).mean() >= _LEAST_DIGITS:
                left -= len(data)
                if left < 0:
                    return found
                name = f"{document.name}#{n}"
                found.append(Document(name, "python", document.part, piece))
    return found


def write_digit_texts(folder: Path, quick: bool) -> None:
    """The study's text, a jsonl a part and domain; what is held out has no near-duplicate."""
    if folder.exists():
        return
    share = 0.02 if quick else 1.0
    most = {part: int(size * share) for part, size in _TEXT_BYTES.items()}
    python = {part: digit_rich((_PARTS.get(part, part),), most[part], quick) for part in most}
    if not quick:
        read_before = [*python["train"], *documents(("zoo",), ("python",))]
        for part in (_VALIDATION, _HELD_OUT):
            python[part], dropped = drop_near_duplicates(read_before, python[part])
            terminal().say(f"{part}: {dropped} near-duplicates of trained text left out")
    new = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for part, size in most.items():
        texts = {
            "python": [document.text for document in python[part]],
            "numbers": numbers_of(_SEEDS_OF_NUMBERS[part], size),
        }
        for domain, own in texts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (new / f"{part}-{domain}.jsonl").write_text(lines, encoding="utf-8")
    new.rename(folder)


def held_in(folder: Path) -> Sequence[Held]:
    """Validation and held-out text of `write_digit_texts`."""

    def lines(part: str, domain: str) -> list[tuple[str, str]]:
        text = (folder / f"{part}-{domain}.jsonl").read_text(encoding="utf-8")
        return [(domain, json.loads(line)["text"]) for line in text.splitlines()]

    return [
        Held(part, [*lines(part, "python"), *lines(part, "numbers")])
        for part in (_VALIDATION, _HELD_OUT)
    ]


def documents_of(texts: Path, part: str) -> str:
    """The change of a recipe that has a part of `write_digit_texts` as its corpus."""
    entries = ",".join(
        f"{{files: '{texts.resolve()}/{part}-{domain}.jsonl', domain: {domain}}}"
        for domain in ("python", "numbers")
    )
    return f"corpus.documents=[{entries}]"


def taught_source(run: Path, texts: Path, quick: bool) -> Path:
    """Folder of zoo/python, continued on text like that of the study."""
    changes = [
        "target.model=zoo/python",
        "sources=[{name: unread, model: zoo/prose}]",
        documents_of(texts, "source"),
        f"corpus.train_bytes={4000 if quick else 2 * _TEXT_BYTES['source']}",
        "corpus.validation_bytes=10000",
        "corpus.held_out_bytes=5000",
        "training.clm={}",
        "training.num_train_epochs=1",
        "training.learning_rate=1.0e-3",
        "training.validations=1",
    ]
    recipe = load_recipe(_DEMO, changes)
    Pipeline(recipe, run, terminal()).execute(["corpus", "externalize/target", f"train/{CLM}"])
    return trained_folder(run, CLM)


def digits(out: Path, given: argparse.Namespace) -> dict[str, float]:
    """Arms by rate, then by seed, on numbers."""
    quick = given.quick
    model, texts = out / "model", out / "text"
    make(model, quick, terminal())
    write_digit_texts(texts, quick)
    source = given.source
    if source == _TAUGHT:
        source = str(taught_source(out / "source-run", texts, quick).resolve())
    changes = [
        f"target.model={model.resolve()}",
        f"sources=[{{name: python, model: '{source}'}}]",
        documents_of(texts, "train"),
        f"corpus.train_bytes={4000 if quick else 2 * _TEXT_BYTES['train']}",
        "corpus.validation_bytes=10000",  # what chooses is measured apart, in `text`
        "corpus.held_out_bytes=5000",
        "objective.lambda=0.5",
        "training.clm={}",
        "training.num_train_epochs=1",
        "training.validations=1",
        *(["training.per_device_train_batch_size=1"] if quick else []),
        *given.set,
    ]
    study = Study(out, _DEMO, changes, lambda _: held_in(texts))
    study.read()
    before = [
        study.untrained("target-before", study.recipe().target),
        study.untrained("source", study.recipe().sources[0]),
    ]
    rates = given.rates or (_RATES[1:2] if quick else _RATES)
    best: dict[str, list[Unit]] = {}
    for arm in study.known(chosen_arms(given, "digits")):
        first = {rate: study.unit(arm, rate, 0) for rate in rates}
        rate = min(first, key=lambda r: first[r].bits(_VALIDATION))
        seeds = range(1, 1 if quick else given.seeds)
        best[arm.name] = [first[rate], *(study.unit(arm, rate, seed) for seed in seeds)]
        study.figures[f"{arm.name} best rate"] = float(rate)
    return study.figures | report(study, best, before)


# real


def held_of_base(study: Study) -> Sequence[Held]:
    """Validation and held-out documents of the study's own corpus."""
    found = []
    for part in (_VALIDATION, _HELD_OUT):
        joined: dict[tuple[str, str], str] = {}
        for block in read_part(open_corpus(study.base), part):
            key = block.domain, block.document
            joined[key] = joined.get(key, "") + block.text
        found.append(Held(part, [(domain, text) for (domain, _), text in joined.items()]))
    return found


def real(out: Path, given: argparse.Namespace) -> dict[str, float]:
    """All arms on little text, then the best with more."""
    quick = given.quick
    changes = [
        "sources=[{name: source, model: Qwen/Qwen2.5-Coder-0.5B-Instruct, dtype: bfloat16}]",
        "training.clm={}",
        "training.validations=1",
    ]
    if quick:
        changes += [*QUICK, "target.model=zoo/prose", "sources.0.model=zoo/python"]
        changes += ["corpus.train_bytes=8000", "training.row_tokens=576"]
        changes += ["training.bf16=false", "sources.0.dtype=float32", "target.dtype=float32"]
    else:
        changes += [
            "corpus.documents=[{builtin: python}]",
            "corpus.train_bytes=420_000",
            "corpus.validation_bytes=60_000",
            "corpus.held_out_bytes=160_000",
        ]
    study = Study(out, _SMALL, [*changes, *given.set], held_of_base)
    study.read()
    row_tokens = study.recipe().training.row_tokens
    steps = [max(1, int(tokens) // row_tokens) for tokens in (given.screen, given.tokens)]
    rate = (given.rates or ("1.0e-4",))[0]
    screened = {
        arm.name: study.unit(arm, rate, 0, [f"training.max_steps={steps[0]}"])
        for arm in study.known(chosen_arms(given, "real"))
    }
    rivals = sorted(
        (name for name in screened if name != CLM), key=lambda n: screened[n].bits(_VALIDATION)
    )
    last: dict[str, list[Unit]] = {}
    for name in [CLM, *rivals[: given.best]]:
        if name in screened:
            arm, more = screened[name].arm, [f"training.max_steps={steps[1]}"]
            seeds = range(1 if quick else given.seeds_of_real)
            last[name] = [study.unit(arm, rate, seed, more) for seed in seeds]
    before = [
        study.untrained("target-before", study.recipe().target),
        study.untrained("source", study.recipe().sources[0]),
    ]
    figures = report(study, {name: [unit] for name, unit in screened.items()}, before, "screening")
    return study.figures | figures | report(study, last, before)


# figures of a study


def report(
    study: Study, arms: Mapping[str, Sequence[Unit]], before: Sequence[Unit], name: str = "table"
) -> dict[str, float]:
    """Held-out bits per byte of digits and of the rest by domain, and differences of arms.

    An arm's figure is the mean over its seeds. A model that cannot read all of the text is left out
    of the columns by kind.
    """
    units = {unit.name: [unit] for unit in before} | dict(arms)
    (held,) = (held for held in study.texts if held.name == _HELD_OUT)
    means = {n: np.mean([u.sums(_HELD_OUT) for u in own], axis=0) for n, own in units.items()}
    pairs = [(n, to) for to in _COMPARED_WITH if to in arms for n in arms if n not in (CLM, to)]
    scored = next(iter(means.values()))[..., 1].astype(np.int64)
    trained = {n: array for n, array in means.items() if (array[..., 1] == scored).all()}
    kinds = ("digits", "rest")
    scores = Scores(
        [f"{domain} {kind}" for kind in kinds for domain, _ in held.documents],
        np.concatenate([scored[:, k] for k in range(2)]),
        {n: np.concatenate([array[:, k, 0] for k in range(2)]) for n, array in trained.items()},
    )
    found = records(scores, 10_000, 0, pairs)
    lines = table(found, {n: [u.bits(_HELD_OUT) for u in own] for n, own in units.items()})
    write_text(study.out / f"{name}.md", lines)
    figures = {f"{name} {r.model} {r.task}": r.value for r in found if np.isfinite(r.value)}
    for r in found:
        if r.model not in units and r.low is not None and r.high is not None:
            place = f"{name} {r.model} {r.task}"
            figures |= {f"{place} low": r.low, f"{place} high": r.high}
    for n, own in units.items():
        bits = [unit.bits(_HELD_OUT) for unit in own]
        figures[f"{name} {n} all"] = statistics.mean(bits)
        if len(bits) > 1:
            figures[f"{name} {n} all deviation"] = statistics.stdev(bits)
    return figures


def table(found: Sequence[Record], bits: Mapping[str, Sequence[float]]) -> str:
    """Markdown: a row a model, a column a domain and kind, intervals in brackets."""
    tasks = [task for task in dict.fromkeys(r.task for r in found) if task != MEAN]
    rows = [["", *tasks, "all", "deviation of seeds"], ["---"] * (len(tasks) + 3)]
    cells = {
        (r.model, r.task): f"{r.value:.4f}"
        + ("" if r.low is None or r.high is None else f" ({r.low:.4f} to {r.high:.4f})")
        for r in found
    }
    for model in dict.fromkeys([*bits, *(r.model for r in found)]):
        own = bits.get(model, ())
        mean = f"{statistics.mean(own):.4f}" if own else ""
        apart = f"{statistics.stdev(own):.4f}" if len(own) > 1 else ""
        rows.append([model, *(cells.get((model, task), "") for task in tasks), mean, apart])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# the command


def chosen_arms(given: argparse.Namespace, study: str) -> list[Arm]:
    """Those of the command line, CLM first."""
    arms = {arm.name: arm for arm in ARMS}
    for text in given.arm:
        name, _, changes = text.partition(":")
        arms[name] = Arm(name, tuple(change for change in changes.split(",") if change))
    usual = [name for name in arms if name not in ONLY_IF_NAMED]
    wanted = given.only or (QUICK_ARMS[study] if given.quick else usual)
    unknown = sorted(set(wanted) - arms.keys())
    if unknown:
        sys.exit(f"--only {unknown[0]}: there are {', '.join(arms)}")
    return [arms[name] for name in arms if name in wanted]


def main() -> None:
    """Run one of the two studies, or both quickly."""
    parser = command_line(__doc__)
    parser.add_argument("study", nargs="?", choices=["digits", "real"])
    parser.add_argument("--out", type=Path, help="folder of the trainings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME:KEY=VALUE,…")
    parser.add_argument("--only", nargs="+", help="these arms")
    parser.add_argument("--rates", nargs="+", help="of digits; of real the first alone")
    parser.add_argument("--seeds", type=int, default=3, help="of digits")
    parser.add_argument("--source", default=_TAUGHT, help="of digits: a model (default: taught)")
    parser.add_argument("--seeds-of-real", type=int, default=2)
    parser.add_argument("--screen", type=float, default=50_000, help="tokens, of real")
    parser.add_argument("--tokens", type=float, default=100_000, help="of the last of real")
    parser.add_argument("--best", type=int, default=3, help="arms that have these, of real")
    given = parser.parse_args()
    if not given.quick and (given.out is None or given.study is None):
        parser.error("name a study and --out, or give --quick")
    if given.quick:
        given.screen, given.tokens, given.best = 600, 1200, 1
    studies = {"digits": digits, "real": real}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        for name in [given.study] if given.study else list(studies):
            found = studies[name](out / name, given)
            figures |= {f"{name} {key}": value for key, value in found.items()}
            if not given.json:
                print((out / name / "table.md").read_text(encoding="utf-8"))
    if given.json:
        show(figures, True)


if __name__ == "__main__":
    main()
