"""Running tasks through lm_eval.

lm_eval is imported where it is used, here and in `watched`, which stands before its models,
`completions`, and `other_tasks`, which finds its own tasks.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from fusellm.evaluation.lm_eval_import import extra, quiet, seeded, silently_building
from fusellm.evaluation.plans import Definition, Plan
from fusellm.evaluation.records import Answer, Header, Kind, TaskRecord
from fusellm.evaluation.settings import Loaded, Settings
from fusellm.evaluation.watched import watched
from fusellm.progress import Progress, Silent
from fusellm.store.identity import digest

_SOFTWARE = ("lm_eval", "transformers", "torch", "datasets")
_NOT_PROTOCOL = ("task", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")


@dataclass(frozen=True)
class Task:
    """A task that is ready to run.

    Attributes:
        header: without a model.
        task: lm_eval's object.
        metric, filter: of the score.
        unread: why an answer cannot be read from a response.
    """

    header: Header
    task: Any
    metric: str
    filter: str
    unread: Callable[[str], str] = field(default=lambda _: "")

    def of_model(self, facts: Mapping[str, str], settings: Settings) -> Header:
        """The header for a model.

        Args:
            facts: name, fingerprints of weights and tokenizer, precision.
        """
        return replace(self.header, model=dict(facts) | {"batch_size": str(settings.batch_size)})


def make_task(
    suite: str, plan: Plan, definition: Definition, data: Mapping[str, str], settings: Settings
) -> Task:
    """A task of a suite, ready to run.

    Args:
        data: digest of each file that the definition was made from.

    Raises:
        EvaluationError: lm_eval is not installed.
    """
    extra("lm_eval")
    with quiet(), seeded(settings.seed):
        task = _stock_task(plan, definition) if definition.stock else _own_task(plan, definition)
    return ready(
        suite,
        plan.name,
        task,
        (plan.metric, plan.filter),
        plan.kind,
        dict(data),
        settings,
        definition.notes,
        definition.unread,
    )


def ready(
    suite: str,
    name: str,
    task: Any,
    measure: tuple[str, str],
    kind: Kind,
    data: dict[str, str],
    settings: Settings,
    notes: Sequence[str] = (),
    unread: Callable[[str], str] = lambda _: "",
) -> Task:
    """An lm_eval task with the settings applied, and its header."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=settings.seed)
    _limit_writing(task, settings)
    config = {k: _plain(v) for k, v in vars(task.config).items() if k not in _NOT_PROTOCOL}
    config["metadata"] = {
        k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"
    }
    protocol = {
        "config": digest(config),
        "version": config["metadata"].get("version"),
        "output": task.OUTPUT_TYPE,
        "examples": task.get_config("num_fewshot"),
        "metric": measure[0],
        "filter": measure[1],
        "writing": config.get("generation_kwargs"),
        "too_long": settings.too_long,
        "limit": settings.limit,
        "seed": settings.seed,
        "notes": list(notes),
    }
    software = {package: version(package) for package in _SOFTWARE}
    header = Header(suite, name, protocol, kind, data, {}, software)
    return Task(header, task, *measure, unread)


def run_task(
    ready_task: Task,
    loaded: Loaded,
    facts: Mapping[str, str],
    settings: Settings,
    progress: Progress | None = None,
) -> TaskRecord:
    """Run a task on a model, which is left in the mode that it was in.

    Raises:
        EvaluationError: prompts do not fit the model's context, and are not to be cut.
    """
    header = ready_task.of_model(facts, settings)
    ready_task.task.set_fewshot_seed(seed=settings.seed)  # every model is shown the same examples
    what = f"{header.suite}/{header.task}"
    with watched(loaded, settings, progress or Silent(), what) as lm:
        answers = answers_of(ready_task, lm, settings)
        answers = tuple(
            replace(answer, truncated=number in lm.cut) for number, answer in enumerate(answers)
        )
    return TaskRecord(header, answers)


def requests_of(ready_task: Task, settings: Settings) -> list[Any]:
    """What a task asks a model, as lm_eval's requests."""
    task = ready_task.task
    with quiet(), seeded(settings.seed), silently_building(task):
        task.set_fewshot_seed(seed=settings.seed)
        task.build_all_requests(limit=settings.limit, rank=0, world_size=1)
    return list(task.instances)


def answers_of(ready_task: Task, lm: Any, settings: Settings) -> tuple[Answer, ...]:
    """What a model of lm_eval's interface answers to each document."""
    import lm_eval

    task = ready_task.task
    with quiet(), seeded(settings.seed), silently_building(task):
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {ready_task.header.task: task}},
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = [
        sample
        for sample in results["samples"][ready_task.header.task]
        if sample["filter"] == ready_task.filter
    ]
    means = means_of(task)
    seen: dict[str, int] = {}
    answers = []
    for sample in samples:
        document = sample["doc_hash"]
        seen[document] = seen.get(document, 0) + 1
        if seen[document] > 1:
            document = digest([document, seen[document]])
        answers.append(_answer(ready_task, sample, document, means))
    return tuple(answers)


def _answer(ready_task: Task, sample: dict[str, Any], document: str, means: set[str]) -> Answer:
    found = sample[ready_task.metric]
    kind = ready_task.header.kind
    others = {
        name: float(sample[name])
        for name in sample["metrics"]
        if name in means and name != ready_task.metric
    }
    if kind == "bleu":
        reference, response = found
        return Answer(document, sample["prompt_hash"], response, 0.0, reference=reference)
    response = _response(ready_task, sample)
    writes = ready_task.task.OUTPUT_TYPE == "generate_until"
    reason = ready_task.unread(response) if writes else ""
    if writes and sample["filtered_resps"][0] == "[invalid]":
        reason = "no answer found"
    return Answer(
        document, sample["prompt_hash"], response, float(found), reason=reason, others=others
    )


def _response(ready_task: Task, sample: dict[str, Any]) -> str:
    """What was written, or the choice that was taken."""
    task = ready_task.task
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0])
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        nats = np.array([found[0] for found in sample["filtered_resps"][: len(choices)]])
        if ready_task.metric == "acc_norm":
            nats = nats / np.array([float(len(choice)) for choice in choices])
        return str(choices[int(np.argmax(nats))])
    is_greedy = sample["filtered_resps"][0][1]
    return str(sample["arguments"][0][1]) if is_greedy else ""


def means_of(task: Any) -> set[str]:
    """Measures of a task that are averaged over documents, higher being better."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return {name for name, how in task.aggregation().items() if how is mean and better.get(name)}


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


def _limit_writing(task: Any, settings: Settings) -> None:
    if task.OUTPUT_TYPE != "generate_until" or settings.max_new_tokens is None:
        return
    from lm_eval.models.utils import normalize_gen_kwargs

    wanted = dict(task.config.generation_kwargs)
    most = normalize_gen_kwargs(wanted)["max_gen_toks"]
    for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        wanted.pop(alias, None)
    wanted["max_gen_toks"] = min(most, settings.max_new_tokens)
    task.set_config(key="generation_kwargs", value=wanted)


def _plain(value: Any) -> Any:
    """A task's configuration as JSON; functions by their source, ours by their name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if not callable(value):  # lm_eval's own objects, as of examples
        return _plain(vars(value))
    module = getattr(value, "__module__", "")
    name = getattr(value, "__qualname__", type(value).__name__)
    if module.split(".")[0] == "fusellm":
        return f"{module}.{name}"
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):
        return name
    return hashlib.sha256(source.encode()).hexdigest()
