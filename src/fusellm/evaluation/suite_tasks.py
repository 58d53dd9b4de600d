"""The tasks of a suite, found, read and made ready to run."""

from collections.abc import Iterator

from fusellm.errors import EvaluationError
from fusellm.evaluation.data import find_files, read_rows, read_text
from fusellm.evaluation.harness import Task, make_task
from fusellm.evaluation.other_tasks import other_tasks
from fusellm.evaluation.plans import Inputs, Plan
from fusellm.evaluation.settings import Settings
from fusellm.evaluation.suites import Suite, named
from fusellm.store.identity import digest


def tasks_of(name: str, settings: Settings) -> Iterator[Task]:
    """The tasks of a suite, ready to run; each is read when its turn comes.

    Raises:
        EvaluationError: there is no such suite or task, or data or a package is missing. What can
            be known at the start is said at the start.
    """
    suite = named(name)
    if suite is None:
        yield from other_tasks(name, settings)
        return
    plans = plans_of(suite, settings)
    require_data(plans, settings)
    for plan in plans:
        yield read_task(suite.name, plan, settings)


def plans_of(suite: Suite, settings: Settings) -> tuple[Plan, ...]:
    """The tasks of a suite that are to be run.

    Raises:
        EvaluationError: the suite has no such task, or is not run here.
    """
    if not suite.plans:
        raise EvaluationError(f"the suite {suite.name} is not run on lm_eval")
    names = [plan.name for plan in suite.plans]
    for wanted in settings.only:
        if wanted not in names:
            raise EvaluationError(f"{suite.name} has no task {wanted!r}; it has {', '.join(names)}")
    return tuple(p for p in suite.plans if not settings.only or p.name in settings.only)


def require_data(plans: tuple[Plan, ...], settings: Settings) -> None:
    """Check that the data of all tasks is there before the first of them is run.

    Raises:
        EvaluationError: some is not; the message has every task without data, with the first
            file that is missing and where to get it.
    """
    faults = without_data(plans, settings)
    if faults:
        name, first = next(iter(faults.items()))
        more = [other for other in faults if other != name]
        raise EvaluationError(
            f"{name}: {first}"
            + (f". The same holds for {', '.join(more)}" if more else "")
            + (". --tasks runs those that have their data" if len(faults) < len(plans) else "")
        )


def without_data(plans: tuple[Plan, ...], settings: Settings) -> dict[str, str]:
    """The tasks whose data is not at hand, with the first file that is missing."""
    faults: dict[str, str] = {}
    for plan in plans:
        for origin in (*plan.texts.values(), *plan.rows.values()):
            downloadable = origin.hub is not None and settings.allow_download
            if not downloadable and not find_files(origin, settings.data_dir):
                faults.setdefault(plan.name, origin.missing(settings.data_dir))
    return faults


def read_task(suite: str, plan: Plan, settings: Settings) -> Task:
    """A task of a suite with its data, ready to run.

    Raises:
        EvaluationError: data or a package is missing.
    """
    digests: dict[str, str] = {}
    rows, texts = {}, {}
    for name, origin in plan.rows.items():
        found = read_rows(origin, settings.data_dir, settings.allow_download)
        rows[name] = found.rows
        digests |= found.digests
    for name, origin in plan.texts.items():
        texts[name], read = read_text(origin, settings.data_dir)
        digests |= read
    definition = plan.define(Inputs(rows, texts))
    if not digests:
        digests["made in code"] = digest(list(definition.rows))
    return make_task(suite, plan, definition, digests, settings)
