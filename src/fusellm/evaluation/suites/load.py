"""The tasks of a suite, found, read and made ready to run."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError
from fusellm.evaluation.harness.lm_eval import extra, quiet, seeded
from fusellm.evaluation.harness.run import HarnessTask, ready
from fusellm.evaluation.suites.catalogue import Suite, named
from fusellm.evaluation.suites.data import find_files, read_rows, read_text
from fusellm.evaluation.suites.lm_eval_tasks import lm_eval_tasks
from fusellm.evaluation.suites.task import Definition, Inputs, Plan
from fusellm.store.identity import digest


def tasks_of(name: str, settings: EvaluationSettings) -> Iterator[HarnessTask]:
    """The tasks of a suite, ready to run; each is read when its turn comes.

    Raises:
        EvaluationError: there is no such suite or task, or data or a package is missing. What can
            be known at the start is said at the start.
    """
    suite = named(name)
    if suite is None:
        yield from lm_eval_tasks(name, settings)
        return
    plans = plans_of(suite, settings)
    require_data(plans, settings)
    for plan in plans:
        yield read_task(suite.name, plan, settings)


def plans_of(suite: Suite, settings: EvaluationSettings) -> list[Plan]:
    """The tasks of a suite that are to be run.

    Raises:
        EvaluationError: the suite has no such task, or is not run here.
    """
    if not suite.plans:
        raise EvaluationError(f"the suite {suite.name} is not run on lm_eval")
    suite.require(settings.tasks)
    return [plan for plan in suite.plans if not settings.tasks or plan.name in settings.tasks]


def require_data(plans: Sequence[Plan], settings: EvaluationSettings) -> None:
    """Check that the data of all tasks is there before the first of them is run.

    Raises:
        EvaluationError: some is not; the message has every task without data, with the first
            file that is missing and where to get it.
    """
    faults = without_data(plans, settings)
    if faults:
        (name, first), *others = faults.items()
        raise EvaluationError(
            f"{name}: {first}"
            + (f". The same holds for {', '.join(other for other, _ in others)}" if others else "")
            + (". --tasks runs those that have their data" if len(faults) < len(plans) else "")
        )


def without_data(plans: Sequence[Plan], settings: EvaluationSettings) -> dict[str, str]:
    """The tasks whose data is not at hand, with the first file that is missing."""
    faults: dict[str, str] = {}
    for plan in plans:
        for origin in (*plan.texts.values(), *plan.rows.values()):
            downloadable = origin.hub is not None and settings.allow_download
            if not downloadable and not find_files(origin, settings.data_folder):
                faults.setdefault(plan.name, origin.missing(settings.data_folder))
    return faults


def read_task(suite: str, plan: Plan, settings: EvaluationSettings) -> HarnessTask:
    """A task of a suite with its data, ready to run.

    Raises:
        EvaluationError: data or a package is missing.
    """
    folder = settings.data_folder
    digests: dict[str, str] = {}
    rows, texts = {}, {}
    for name, origin in plan.rows.items():
        rows[name], read = read_rows(origin, folder, settings.allow_download)
        digests |= read
    for name, origin in plan.texts.items():
        texts[name], read = read_text(origin, folder)
        digests |= read
    definition = plan.define(Inputs(rows, texts))
    if not digests:
        digests["made in code"] = digest(list(definition.rows))
    return make_task(suite, plan, definition, digests, settings)


def make_task(
    suite: str,
    plan: Plan,
    definition: Definition,
    data: dict[str, str],
    settings: EvaluationSettings,
) -> HarnessTask:
    """A task of a suite, ready to run.

    Args:
        data: digest of each file that the definition was made from.

    Raises:
        EvaluationError: lm_eval is not installed.
    """
    extra("lm_eval")
    with quiet(), seeded():
        task = _stock_task(plan, definition) if definition.stock else _own_task(plan, definition)
    measure = plan.metric, plan.filter
    notes, unread = definition.notes, definition.unread
    return ready(suite, plan.name, task, measure, plan.kind, data, settings, notes, unread)


def _own_task(plan: Plan, definition: Definition) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = Dataset.from_list(list(definition.rows))
    config = deepcopy(definition.config) | {
        "task": plan.name,
        "custom_dataset": lambda **_: {definition.split: rows},
        f"{definition.split}_split": definition.split,
    }
    return ConfigurableTask(config=config)


def _stock_task(plan: Plan, definition: Definition) -> Any:
    """A task of lm_eval on our rows: its file, included by one that names them."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    assert definition.stock is not None
    with TemporaryDirectory(prefix="fusellm-task-") as name:
        folder = Path(name)
        data = folder / "rows.parquet"
        Dataset.from_list(list(definition.rows)).to_parquet(data)
        splits = dict.fromkeys(f"{s}_split" for s in ("training", "validation", "test"))
        body = {
            "include": str(files("lm_eval") / "tasks" / definition.stock),
            "task": plan.name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {definition.split: str(data)},
                "cache_dir": str(folder / "cache"),
                "keep_in_memory": True,
            },
            **splits,
            f"{definition.split}_split": definition.split,
            **definition.config,
        }
        path = folder / "tasks" / f"{plan.name}.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(body), encoding="utf-8")
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        return manager.load([plan.name])["tasks"][plan.name]
