"""What fusion gains on real language models: the suspects, the search, and the result.

    python benchmarks/real.py STUDY --out DIR [--recipe FILE] [--set KEY=VALUE] [--json]

    suspects   one thing changed at a time, on little text: validation part
    search     rates of CLM and of fused, searched alike: validation part
    result     CLM and fused by seed, from all sources or one, with and without token healing, and
               with the target as a referee or as a source: text of the installed packages that
               was held out, and text of `--recent DIR` (benchmarks/recent_text.py), with
               intervals over documents, paired; `--arm NAME-seedN` trains and measures these alone
    stages     the recipe itself: seconds, tokens a second and peak memory of each stage and model

All but `stages` read the distributions once (DIR/base) and train many times; what is finished is
kept, and an interrupted study goes on from its last checkpoint. Figures go to DIR/figures.jsonl, a
line a training. The recipe is recipes/small.yaml; its models come from the hub, or from folders:

    --set target.model=M/smollm2 --set sources.0.model=M/qwen-coder --set sources.1.model=M/gemma3
    --set sources.2.model=M/smollm2

`--device cpu` hides the GPUs. `--quick` does it with the zoo's models and next to no text.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from figures import command_line, peak_bytes, show
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.config import ModelSettings, Recipe
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.text.intervals import Record, Scores, records
from fusellm.evaluation.text.nats import blocks_nats
from fusellm.models.load import default_device, load_model, load_tokenizer, locate
from fusellm.pipeline import Pipeline
from fusellm.recipe_file import load_recipe
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.identity import digest
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import CLM, FUSED
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusion_gain import QUICK, validation, variant

_SMALL = Path(__file__).parent.parent / "src" / "fusellm" / "recipes" / "small.yaml"
_ZOO = [
    "target.model=zoo/prose",
    *(f"sources.{n}.model=zoo/{name}" for n, name in enumerate(("python", "cpp", "prose"))),
]
_LITTLE = [  # some 100,000 tokens
    "training.max_steps=75",
    "training.per_device_train_batch_size=2",
    "training.validations=2",
]
_RATES = ("2.5e-5", "5e-5", "1e-4", "2e-4")
_RECENT_BYTES, _BEGINNING_BYTES = 150_000, 4096
SELF = "itself"
"""Name of the target where it is one of its own sources, or their referee."""


@dataclass(frozen=True)
class Arm:
    """A training.

    Attributes:
        which: `clm` or `fused`.
        changes: of the recipe.
        sources: names of those that it is fused from; all if empty.
        seed: of the training.
        refereed: whether the target is their referee.
    """

    which: str
    changes: Sequence[str] = ()
    sources: Sequence[str] = ()
    seed: int = 0
    refereed: bool = False


@dataclass
class Study:
    """A recipe, whose sources are read once, and trainings on what was read."""

    file: Path
    out: Path
    changes: Sequence[str]
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.out / "base"
        sources = load_recipe(self.file, self.changes).sources
        self.all = [source.name for source in sources if source.name != SELF]

    def recipe(self, changes: Sequence[str] = ()) -> Recipe:
        """With the target as one more source, whose distributions any arm may use."""
        own = load_recipe(self.file, [*self.changes, *changes])
        raw = own.model_dump(by_alias=True)
        others = [source for source in raw["sources"] if source["name"] != SELF]
        raw["sources"] = [*others, raw["target"] | {"name": SELF}]
        return Recipe.model_validate(raw)

    def read(self) -> None:
        """Read all sources, and the target as one."""
        Pipeline(self.recipe(), self.base, terminal()).execute(["corpus", "externalize"])

    def train(self, name: str, arm: Arm) -> Path:
        """Train an arm, or go on with it; the run's folder."""
        changes = [*arm.changes, f"training.seed={arm.seed}", "training.clm={}"]
        recipe = self.recipe(changes)
        wanted = {*(arm.sources or self.all), *((SELF,) if arm.refereed else ())}
        sources = [
            s.model_copy(update={"referee": arm.refereed and s.name == SELF})
            for s in recipe.sources
            if s.name in wanted
        ]
        recipe = recipe.model_copy(update={"sources": sources})
        began = time.perf_counter()
        run = self.out / name
        stages = [f"train/{CLM}"] if arm.which == CLM else ["fuse", f"train/{FUSED}"]
        is_new = not (run / "train" / arm.which / "log.jsonl").exists()
        variant(self.base, run, recipe).execute(stages)
        self.figures[name] = validation(run, arm.which)
        if not is_new:
            return run
        lines = [f"{time.perf_counter() - began:.0f} s", *arm.changes]
        with (self.out / "figures.jsonl").open("a", encoding="utf-8") as file:
            row = {"name": name, "validation": self.figures[name], "how": lines}
            file.write(json.dumps(row) + "\n")
        return run


def terminal() -> Terminal:
    """Where progress is shown."""
    return Terminal(SafeConsole(stderr=True))


def suspects() -> dict[str, Arm]:
    """What may have kept the first run from a gain, one thing at a time.

    That run had `corpus.train_bytes=360_000`.
    """
    rate, little = "training.learning_rate=1e-4", _LITTLE
    half = ["training.per_device_train_batch_size=1", "training.max_steps=150"]
    one = ("qwen-coder",)

    def fused(*changes: str, sources: Sequence[str] = one) -> Arm:
        return Arm(FUSED, [*little, rate, *changes], sources)

    return {
        "clm": Arm(CLM, [*little, rate]),
        "fused": fused(),
        "self-source": fused(sources=(*one, SELF)),
        "rate-3e-4": fused("training.learning_rate=3e-4"),
        "rate-5e-5": fused("training.learning_rate=5e-5"),
        "clm-rate-5e-5": Arm(CLM, [*little, "training.learning_rate=5e-5"]),
        "half-batch": fused(*half),
        "clm-half-batch": Arm(CLM, [*little, rate, *half]),
        "lambda-0.1": fused("objective.lambda=0.1"),
        "bytes": fused("objective.lambda=0.1", "fusion.strategy=bytes"),
    }


def search(study: Study, rates: Sequence[str]) -> dict[str, float]:
    """Bits per byte on the validation part by rate; the target is none of the sources."""
    for rate in rates:
        for which in (CLM, FUSED):
            study.train(f"{which}-{rate}", Arm(which, [f"training.learning_rate={rate}"]))
    return study.figures


@dataclass(frozen=True)
class Held:
    """Held-out documents: (domain, name, text)."""

    name: str
    documents: Sequence[tuple[str, str, str]]


def held_out(study: Study, recent: Path | None) -> list[Held]:
    """Text of installed packages, and text that is newer than the models."""
    joined: dict[tuple[str, str], str] = {}
    for block in read_part(open_corpus(study.base), "held_out"):
        key = block.domain, block.document
        joined[key] = joined.get(key, "") + block.text
    found = [Held("installed", [(*key, text) for key, text in joined.items()])]
    if recent is not None:
        documents = [d for path in sorted(recent.glob("*.jsonl")) for d in beginnings(path)]
        found.append(Held("recent", documents))
    return found


def beginnings(file: Path) -> list[tuple[str, str, str]]:
    """Beginnings of a domain's documents, in the order of a hash, up to a number of bytes.

    Many documents tell more than long ones: intervals are over documents.
    """
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: digest(row["name"]))
    chosen, left = [], _RECENT_BYTES
    for row in rows:
        text = next(cut(row["text"], _BEGINNING_BYTES))
        left -= len(text.encode())
        if left < 0:
            break
        chosen.append((file.stem, str(row["name"]), text))
    return chosen


def nats_of(settings: ModelSettings, held: Held, block_bytes: int, cache: Path) -> list[np.ndarray]:
    """Each document's nats by byte under a model, kept in a file."""
    located = locate(settings)
    key = digest([located.fingerprint, settings.precision, block_bytes, list(held.documents)])
    file = cache / f"{key}.npz"
    if not file.exists():
        encoder = Encoder(load_tokenizer(located))
        pieces = [list(cut(text, block_bytes)) for _, _, text in held.documents]
        texts = [piece for document in pieces for piece in document]
        last = [n + 1 == len(d) for d in pieces for n in range(len(d))]
        sizes = [len(piece.encode()) for piece in texts]
        model = load_model(located, default_device())
        with terminal().start(f"{held.name}: {settings.model}", len(texts), "blocks") as bar:
            encoded = encoder.encode(texts, last)
            read = iter(blocks_nats(model, encoded, sizes, None, bar.advance))
        rows = [
            np.concatenate([np.full(len(p.encode()), np.nan) if r is None else r for p, r in part])
            for part in ([(p, next(read)) for p in document] for document in pieces)
        ]
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, *rows)
    with np.load(file, allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]


def compare(
    held: Held,
    nats: Mapping[str, Sequence[np.ndarray]],
    pairs: Sequence[tuple[str, str]],
) -> list[Record]:
    """Bits per byte of all models over bytes that all scored, and differences of pairs."""
    sums = {name: np.zeros(len(held.documents)) for name in nats}
    scored_bytes = np.zeros(len(held.documents), dtype=np.int64)
    for n in range(len(held.documents)):
        scored = np.isfinite(np.stack([rows[n] for rows in nats.values()])).all(axis=0)
        scored_bytes[n] = scored.sum()
        for name, rows in nats.items():
            sums[name][n] = rows[n][scored].sum()
    scores = Scores([domain for domain, _, _ in held.documents], scored_bytes, sums)
    return records(scores, 10_000, 0, pairs)


def result(study: Study, arms: Mapping[str, Arm], recent: Path | None) -> dict[str, float]:
    """Held-out bits per byte of sources, target and arms, and each arm's difference from CLM.

    An arm is compared with the CLM of its own seed.
    """
    recipe = study.recipe()
    own = {"name", "referee"}
    models = {s.name: ModelSettings(**s.model_dump(exclude=own)) for s in recipe.sources}
    for name, arm in arms.items():
        folder = study.train(name, arm) / "train" / arm.which
        models[name] = recipe.target.model_copy(update={"model": str(folder), "revision": None})
    figures = dict(study.figures)
    pairs = [(n, f"{CLM}-seed{arm.seed}") for n, arm in arms.items() if arm.which != CLM]
    for held in held_out(study, recent):
        nats = {
            name: nats_of(settings, held, recipe.corpus.block_bytes, study.out / "held-out")
            for name, settings in models.items()
        }
        found = compare(held, nats, pairs)
        text = json.dumps([record.as_dict() for record in found], indent=1)
        (study.out / f"{held.name}.json").write_text(text + "\n", encoding="utf-8")
        (study.out / f"{held.name}.md").write_text(table(found), encoding="utf-8")
        figures |= {f"{held.name} {r.model} {r.task}": r.value for r in found}
        figures |= {
            f"{held.name} {r.model} {MEAN} {end}": float(value)
            for r in found
            if r.task == MEAN and "-" in r.model
            for end, value in (("low", r.low), ("high", r.high))
            if value is not None
        }
    return figures


def table(found: Sequence[Record]) -> str:
    """Markdown: a row a model, a column a domain, intervals in brackets."""
    tasks = list(dict.fromkeys(record.task for record in found))
    tasks = [MEAN, *(task for task in tasks if task != MEAN)]
    cells = {
        (r.model, r.task): f"{r.value:.4f}"
        + ("" if r.low is None or r.high is None else f" ({r.low:.4f} to {r.high:.4f})")
        for r in found
    }
    rows = [["", *tasks], ["---"] * (len(tasks) + 1)]
    rows += [[m, *(cells[m, t] for t in tasks)] for m in dict.fromkeys(r.model for r in found)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def result_arms(changes: Mapping[str, Sequence[str]], names: Sequence[str], seeds: int) -> Any:
    """CLM, fused, and fused otherwise, by seed.

    Otherwise is: without token healing, with the target as a referee, from one source alone, and
    with the target as a source.
    """
    as_read = ("fusion.token_healing=false",)
    kinds: list[tuple[str, str, Sequence[str], Sequence[str], bool]] = [
        (CLM, CLM, (), (), False),
        (FUSED, FUSED, (), (), False),
        (f"{FUSED}-as-read", FUSED, as_read, (), False),
        (f"{FUSED}-refereed", FUSED, (), (), True),
        *((f"{FUSED}-{name}", FUSED, (), (name,), False) for name in names),
        *((f"{FUSED}-{name}-as-read", FUSED, as_read, (name,), False) for name in names),
        *((f"{FUSED}-{name}-refereed", FUSED, (), (name,), True) for name in names),
        (f"{FUSED}-{SELF}", FUSED, (), (*names, SELF), False),
    ]
    return {
        f"{name}-seed{seed}": Arm(which, [*changes[which], *more], sources, seed, refereed)
        for name, which, more, sources, refereed in kinds
        for seed in range(seeds)
    }


def stages(study: Study, most: int | None = None) -> dict[str, float]:
    """Run the recipe stage by stage, each in a process of its own; the first so many."""
    recipe = load_recipe(study.file, study.changes)
    run = study.out / recipe.name
    names = [f"externalize/{source.name}" for source in recipe.sources]
    order = ["corpus", "externalize/target", *names, "fuse"]
    order += [f"train/{FUSED}", f"train/{CLM}", "evaluate", "report"]
    figures: dict[str, float] = {}
    for stage in order[:most]:
        command = [sys.executable, __file__, "stages", f"--out={study.out}", "--json"]
        command += [f"--recipe={study.file}", f"--stage={stage}", f"--run={run}"]
        done = subprocess.run(
            [*command, *(f"--set={change}" for change in study.changes)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        figures |= {f"{stage} {name}": value for name, value in found.items()}
    return figures


def one_stage(study: Study, run: Path, stage: str) -> dict[str, float]:
    """Run one stage here; seconds and tokens a second are those that its manifest has."""
    recipe = load_recipe(study.file, study.changes)
    Pipeline(recipe, run, terminal()).execute([stage])
    figures = {"peak_mb": peak_bytes() / 2**20}
    folder = run / stage
    if (folder / "manifest.json").exists():
        manifest = StageFolder(folder)
        figures["seconds"] = manifest.seconds
        tokens = manifest.counts.get("tokens")
        if tokens and manifest.seconds:
            figures |= {"tokens": tokens, "tokens_per_second": tokens / manifest.seconds}
    return figures


def main() -> None:
    """Run a study."""
    parser = command_line(__doc__)
    parser.add_argument("study", choices=["suspects", "search", "result", "stages"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--recipe", type=Path, default=_SMALL)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--only", action="append", default=[], choices=list(suspects()), help="of the suspects"
    )
    parser.add_argument("--rates", nargs="+", default=_RATES, help="of the search")
    parser.add_argument("--recent", type=Path, help="folder of recent_text.py")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arm", action="append", default=[], help="of the result: NAME-seedN")
    for which in (CLM, FUSED):
        parser.add_argument(f"--{which}", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here; leave it out, or install a CUDA build")
    quick = [*_ZOO, *QUICK, "training.row_tokens=576", "training.bf16=false"]
    study = Study(given.recipe, given.out, [*(quick if given.quick else []), *given.set])
    if given.stage:
        figures = one_stage(study, given.run, given.stage)
    elif given.study == "stages":
        figures = stages(study, 3 if given.quick else None)
    else:
        study.read()
        figures = studied(study, given)
    show(figures, given.json, ".4f")


def studied(study: Study, given: argparse.Namespace) -> dict[str, float]:
    """The figures of a study over what has been read."""
    if given.study == "suspects":
        arms = suspects()
        for name in given.only or (list(arms)[:2] if given.quick else arms):
            arm = arms[name]
            if given.quick:
                arm = Arm(arm.which, [*arm.changes, "training.max_steps=4"], arm.sources)
            study.train(f"suspect-{name}", arm)
        return study.figures
    if given.study == "search":
        return search(study, given.rates[:1] if given.quick else given.rates)
    changes = {CLM: given.clm, FUSED: given.fused}
    seeds = 1 if given.quick else given.seeds
    arms = result_arms(changes, study.all, seeds)
    if given.quick and not given.arm:
        given.arm = [f"{name}-seed0" for name in (CLM, FUSED, f"{FUSED}-refereed")]
    unknown = sorted(set(given.arm) - arms.keys())
    if unknown:
        sys.exit(f"--arm {unknown[0]}: there are {', '.join(arms)}")
    chosen = {name: arm for name, arm in arms.items() if not given.arm or name in given.arm}
    for name, arm in chosen.items():
        if f"{CLM}-seed{arm.seed}" not in chosen:
            sys.exit(f"--arm {name} is compared with {CLM}-seed{arm.seed}; name that too")
    return result(study, chosen, given.recent)


if __name__ == "__main__":
    main()
