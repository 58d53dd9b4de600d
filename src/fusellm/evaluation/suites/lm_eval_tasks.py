"""Any task of lm_eval by its own name, on its own data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError
from fusellm.evaluation.compare.records import Kind
from fusellm.evaluation.harness.lm_eval import extra, quiet, seeded
from fusellm.evaluation.harness.run import HarnessTask, means_of, ready
from fusellm.evaluation.suites.catalogue import unknown
from fusellm.evaluation.suites.data import DOWNLOAD
from fusellm.store.identity import digest

_PREFERRED = ("acc_norm", "acc", "exact_match", "em", "f1")
_BINARY = ("acc_norm", "acc", "exact_match", "em")


def lm_eval_tasks(name: str, settings: EvaluationSettings) -> list[HarnessTask]:
    """The tasks of lm_eval under a name: a task, a group or a tag.

    Raises:
        EvaluationError: lm_eval has none, or what it has reads its data from the hub and that is
            not allowed or not reached, runs generated code, reads pictures, or has no measure
            that is a mean over documents.
    """
    extra("lm_eval")
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager()
    if name not in manager.all_tasks:
        raise unknown(name, manager.all_tasks)
    if not settings.allow_download:
        raise EvaluationError(
            f"{name} is a task of lm_eval, which gets its data from the hub; allow that: {DOWNLOAD}"
        )
    try:
        with quiet(), seeded(), _no_code_from_the_hub():
            tasks: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # a task runs code of its own, and fails as that does
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(
            f"lm_eval could not load {name} ({type(error).__name__}: {reason}); is the hub "
            "reachable? Measures that are code on the hub, as in humaneval, are not fetched"
        ) from error
    wanted = settings.tasks or tuple(tasks)
    if not set(wanted) <= tasks.keys():
        raise EvaluationError(
            f"{name} has the tasks {', '.join(tasks)}, not {', '.join(wanted)}; name some of these"
        )
    return [_ready(name, label, tasks[label], settings) for label in tasks if label in wanted]


def _ready(suite: str, label: str, task: Any, settings: EvaluationSettings) -> HarnessTask:
    if getattr(task, "UNSAFE_CODE", False):
        raise EvaluationError(
            f"{label} runs generated code with no sandbox; the suites multiple and humaneval have "
            "one"
        )
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(f"{label} has documents that are not text; take another task")
    metric, kind = _measure(label, task)
    filters = task.config.filter_list
    chosen = filters[0]["name"] if filters else "none"
    parts = [task.config.dataset_path, task.config.dataset_name]
    place = "hub:" + "/".join(str(part) for part in parts if part)
    data = {place: digest([repr(document) for document in task.eval_docs])}
    return ready(suite, label, task, (metric, chosen), kind, data, settings)


def _measure(label: str, task: Any) -> tuple[str, Kind]:
    means = means_of(task)
    for metric in (*_PREFERRED, *sorted(means)):
        if metric in means:
            return metric, "binary" if metric in _BINARY else "value"
    if "bleu" in task.aggregation():
        return "bleu", "bleu"
    raise EvaluationError(
        f"{label} has no measure that is a mean over documents, higher being better (it has "
        f"{', '.join(task.aggregation())}); for perplexity take the suite lm"
    )


@contextmanager
def _no_code_from_the_hub() -> Iterator[None]:
    """Keep `evaluate`, which lm_eval looks unknown measures up in, from fetching their code."""
    import evaluate

    was = evaluate.config.HF_EVALUATE_OFFLINE
    evaluate.config.HF_EVALUATE_OFFLINE = True
    try:
        yield
    finally:
        evaluate.config.HF_EVALUATE_OFFLINE = was
