"""`fusellm study`: many trainings that differ in a few settings each, and one page of it all."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusellm.cli import options
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.draw import table
from fusellm.cli.launch import require_one_process

if TYPE_CHECKING:
    from fusellm.study.plan import Study
    from fusellm.study.results import StudyResults

Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="Trainings at a time, each in a process of its own. With GPUs each has one of "
        "them, in turn; without, the cores are divided.",
    ),
]

Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        metavar="NAME",
        help="Only this arm, the reference and what they need, also on the page; may be repeated.",
    ),
]


def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="The study's file.", show_default=False)
    ],
    out: options.Out = None,
    arms: Arms = None,
    jobs: Jobs = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="Check the study, say what it would train, and stop.")
    ] = False,
    redo: options.Redo = False,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    workers: options.Workers = None,
    worker_cpus: options.WorkerCpus = None,
    worker_gpus: options.WorkerGpus = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Train a recipe in several ways, and compare them: arms, seeds, searched learning rates.

    Each arm is the base recipe with some settings changed. What arms have in common is made once:
    a source that has been read is not read again. Finished trainings are kept: after an
    interruption, or with another arm in the file, give the same command again.

    A study looks like this:

        name: hindsight
        recipe: recipes/demo.yaml
        seeds: [0, 1, 2]
        rates: [5.0e-4, 2.0e-3]
        arms:
          clm: {train: clm}
          fused: {}
          before: {set: {fusion.hindsight: false}}

    With --engine ray a cluster's workers read the sources and train the models; the study's folder
    must then be where all its machines see it.

    It ends in a page, study.md, and in study.json: bits per byte of held-out text with intervals,
    paired differences, tokens and computing. docs/study.md explains each key.
    """
    require_one_process("study")
    from fusellm.study.plan import load_study

    loaded = load_study(file, arms or [])  # what is wrong is told before torch is imported
    if plan:
        _say_plan(loaded, as_json)
        return
    from fusellm.reading.engine import EngineSettings
    from fusellm.study.run import run_study

    where = EngineSettings(engine, ray_address, workers, worker_cpus, worker_gpus)
    folder = out or Path("runs") / loaded.settings.name
    how: dict[str, Any] = {"jobs": jobs, "redo": redo, "trust_remote_code": trust_remote_code}
    how |= {"engine": where, "progress": Terminal(STDERR)}
    results = run_study(file, folder, arms=arms or [], **how)
    _show(results, folder, as_json)


def _show(results: "StudyResults", folder: Path, as_json: bool) -> None:
    """The mean over domains of each arm, and its difference from the reference."""
    from fusellm.evaluation.compare.statistics import MEAN
    from fusellm.study.page import interval, verdict
    from fusellm.study.run import JSON, PAGE

    if as_json:
        print(json_text(results.as_json()))
        return
    beside = {one.arm: one for one in results.differences if one.other == results.reference}
    shown = table("", ">bits per byte", f">less {results.reference}", ">p", "")
    for name, by_task in results.untrained.items():
        shown.add_row(name, f"{by_task[MEAN].value:.4f}")
    for name, arm in results.arms.items():
        one = beside.get(name)
        told = ("", "", "")
        if one is not None:
            p = "" if one.corrected is None else f"{one.corrected:.3f}"
            told = (interval(one.by_task[MEAN]), p, verdict(one))
        shown.add_row(name, f"{arm.by_task[MEAN].value:.4f}", *told)
    STDOUT.print(shown)
    STDOUT.say(f"The page: {folder / PAGE}; all figures: {folder / JSON}")


def _say_plan(loaded: "Study", as_json: bool) -> None:
    seeds = len(loaded.settings.seeds)
    rows: list[tuple[str, str, int, int]] = []
    for name in loaded.chosen:
        arm = loaded.arm(name)
        if arm.kind == "training":
            rows.append((name, arm.train, len(loaded.rates(name)), seeds - 1))
        else:
            of = f" of {', '.join(arm.needs)}" if arm.needs else ""
            rows.append((name, f"{arm.kind}{of}", 0, 0))
    if as_json:
        keys = ("arm", "train", "trainings_to_find_the_rate", "trainings_of_other_seeds")
        print(json_text([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    shown = table("arm", "trains", ">to find the rate", ">other seeds", title=loaded.settings.name)
    for name, train, rates, others in rows:
        shown.add_row(name, train, str(rates), str(others))
    STDOUT.print(shown)
    STDOUT.say(f"{sum(row[2] + row[3] for row in rows)} trainings")
