"""Which suites there are, and whether their data is at hand."""

from typing import Any

from fusellm.config import EvaluationSettings
from fusellm.evaluation.code.tasks import CODE_SUITES, without_problems
from fusellm.evaluation.suites.catalogue import SUITES
from fusellm.evaluation.suites.load import without_data

_TOLD = ("about", "contains", "tasks", "documents", "data")


def suites_at_hand(settings: EvaluationSettings) -> list[dict[str, Any]]:
    """A row for each suite: what it is, and which of its tasks can be run and which not, and why.

    Args:
        settings: say where data is, and whether it may be fetched.
    """
    rows = []
    for suite in SUITES.values():
        code = CODE_SUITES.get(suite.name)
        missing = without_problems(code, settings) if code else without_data(suite.plans, settings)
        row = {name: getattr(suite, name) for name in _TOLD}
        at_hand = sorted(set(suite.tasks) - missing.keys())
        rows.append({"suite": suite.name} | row | {"at_hand": at_hand, "missing": missing})
    return rows
