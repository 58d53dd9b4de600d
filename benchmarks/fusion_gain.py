"""What fusion gains over plain continued training on the demo: the search, and the seeds.

    python benchmarks/fusion_gain.py search --out DIR   rates and schedules; validation part
    python benchmarks/fusion_gain.py seeds --out DIR    the demo's setting by seed; held-out part

Both read the distributions once and train many times. `--set` changes the demo's recipe, `--quick`
does a fiftieth of the work, `--json` prints one flat object of figures.
"""

import json
import shutil
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from figures import command_line, show
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.config import Recipe
from fusellm.pipeline import Pipeline
from fusellm.recipe_file import load_recipe
from fusellm.stages.evaluate import read_records
from fusellm.store.run_folder import CLM, FUSED

_DEMO = Path(__file__).parent.parent / "recipes" / "demo-full.yaml"
_TEXT = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
QUICK = [
    f"corpus.documents=[{{files: '{_TEXT}', domain: python}}]",
    "corpus.train_bytes=24000",
    "corpus.held_out_bytes=5000",
    "corpus.validation_bytes=5000",
    "training.num_train_epochs=1",
]
_RATES = ("1.0e-4", "5.0e-4", "1.0e-3", "2.0e-3")


def variant(base: Path, out: Path, recipe: Recipe) -> Pipeline:
    """A run that shares the base's corpus and distributions."""
    for name in ("corpus", "externalize"):
        if not (out / name).exists():
            shutil.copytree(base / name, out / name, copy_function=_link)
    return Pipeline(recipe, out, Terminal(SafeConsole(stderr=True)))


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def demo_recipe(changes: list[str]) -> Recipe:
    return load_recipe(_DEMO, changes)


def validation(run: Path, which: str) -> float:
    """The last mean bits per byte over the validation part."""
    lines = (run / "train" / which / "log.jsonl").read_text().splitlines()
    return float(
        [json.loads(line) for line in lines if "validation" in line][-1]["validation"]["mean"]
    )


def search(
    base: Path, out: Path, changes: list[str], rates: Sequence[str] = _RATES
) -> dict[str, float]:
    """Bits per byte on the validation part: CLM and fused over the same rates and schedules."""
    figures: dict[str, float] = {}
    for which in (CLM, FUSED):
        by_rate = {rate: _searched(base, out, changes, which, rate, "cosine") for rate in rates}
        figures |= {f"{which} lr={rate} cosine": found for rate, found in by_rate.items()}
        best = min(by_rate, key=by_rate.__getitem__)
        linear = _searched(base, out, changes, which, best, "linear")
        figures[f"{which} lr={best} linear"] = linear
    return figures


def _searched(
    base: Path, out: Path, changes: list[str], which: str, rate: str, schedule: str
) -> float:
    run = out / f"{which}-{rate}-{schedule}"
    settings = [
        *changes,
        "training.clm={}",
        f"training.learning_rate={rate}",
        f"training.lr_scheduler_type={schedule}",
    ]
    stages = [f"train/{which}"] if which == CLM else ["fuse", f"train/{which}"]
    variant(base, run, demo_recipe(settings)).execute(stages)
    return validation(run, which)


def seeds(base: Path, out: Path, changes: list[str], count: int) -> dict[str, float]:
    """Held-out bits per byte of the demo's setting, by training seed."""
    figures: dict[str, float] = {}
    for seed in range(count):
        run = out / f"seed-{seed}"
        recipe = demo_recipe([*changes, f"training.seed={seed}"])
        variant(base, run, recipe).execute()
        for record in read_records(run):
            if record.task == "mean" or record.model in ("clm", "fused", "fused-clm"):
                figures[f"{record.model} {record.task} seed={seed}"] = record.value
    gains = [-figures[f"fused-clm mean seed={seed}"] for seed in range(count)]
    deviation = statistics.stdev(gains) if count > 1 else float("nan")
    clm = [figures[f"clm mean seed={seed}"] for seed in range(count)]
    return figures | {
        "gain_mean": statistics.mean(gains),
        "gain_least": min(gains),
        "gain_deviation": deviation,
        "clm_deviation": statistics.stdev(clm) if count > 1 else float("nan"),
    }


def main() -> None:
    """Run one of the two studies."""
    parser = command_line(__doc__)
    parser.add_argument("study", choices=["search", "seeds"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    changes = [*(QUICK if arguments.quick else []), *arguments.set]
    base = arguments.out / "base"
    Pipeline(demo_recipe(changes), base, Terminal(SafeConsole(stderr=True))).execute(
        ["corpus", "externalize"]
    )
    if arguments.study == "search":
        rates = _RATES[:1] if arguments.quick else _RATES
        figures = search(base, arguments.out, changes, rates)
    else:
        figures = seeds(base, arguments.out, changes, 1 if arguments.quick else arguments.seeds)
    show(figures, arguments.json, ".4f")


if __name__ == "__main__":
    main()
