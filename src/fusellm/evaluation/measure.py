"""Measuring models by suites: one in memory at a time, and nothing twice."""

import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fusellm.errors import EvaluationError, IdentityError
from fusellm.evaluation.comparison import NotRun
from fusellm.evaluation.harness import Task, requests_of, run_task
from fusellm.evaluation.multiple import (
    CODE_SUITES,
    CodeTask,
    prepare_languages,
    requests_of_language,
    run_language,
)
from fusellm.evaluation.records import Header, TaskRecord, read_record, write_record
from fusellm.evaluation.settings import Loaded, Settings
from fusellm.evaluation.suite_tasks import tasks_of
from fusellm.evaluation.suites import named
from fusellm.evaluation.watched import Ruler, Watched, require_readable
from fusellm.models.headers import require_loadable
from fusellm.models.load import Located, default_device, load_model, load_tokenizer
from fusellm.progress import Progress, Silent
from fusellm.store.files import make_folder
from fusellm.store.identity import Identity, digest


@dataclass(frozen=True)
class Candidate:
    """A model that is to be measured.

    Attributes:
        facts: what `Header.model` says of it; its `name` names the folder of its records.
        ruler: tells whether prompts fit before it is loaded; None where any do.
    """

    facts: Mapping[str, str]
    load: Callable[[], Loaded]
    ruler: Ruler | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.facts["name"]


@dataclass(frozen=True)
class Prepared:
    """A suite whose data, packages and sandbox have been found."""

    suite: str
    tasks: tuple[Task | CodeTask, ...]
    not_run: tuple[NotRun, ...] = ()


def candidate(name: str, located: Located) -> Candidate:
    """A model that has been found, to be loaded when it is needed.

    Raises:
        EvaluationError: lm_eval cannot use its tokenizer.
        ModelError: its tokenizer, or a package that it is loaded with, is missing, or its files
            are not what they should be.
    """
    require_loadable(located)
    tokenizer = load_tokenizer(located)
    require_readable(tokenizer)
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    specials = tokenizer.special_tokens_map
    facts = {
        "name": name,
        "weights": located.fingerprint,
        "tokenizer": digest([type(tokenizer).__name__, rules, specials]),
        "precision": located.settings.precision,
    }

    def load() -> Loaded:
        model = load_model(located, default_device())
        return Loaded(model, load_tokenizer(located), located.context_tokens)

    context = located.context_tokens
    return Candidate(facts, load, None if context is None else Ruler(tokenizer, context))


def prepare(suites: Sequence[str], settings: Settings, progress: Progress) -> list[Prepared]:
    """Find the data, packages and sandbox of suites, before any model is loaded.

    `settings.only` are tasks of any of them; each suite runs those that it has.

    Raises:
        EvaluationError: something is missing, or a name is unknown.
    """
    found = []
    for name in dict.fromkeys(suites):
        own = replace(settings, only=_only_of(name, suites, settings.only))
        if name in CODE_SUITES:
            found.append(Prepared(name, *prepare_languages(CODE_SUITES[name], own, progress)))
        else:
            found.append(Prepared(name, tuple(tasks_of(name, own))))
    return found


def _only_of(name: str, suites: Sequence[str], only: Sequence[str]) -> tuple[str, ...]:
    """Of the tasks that are asked for those that this suite has, or that no other one has."""
    theirs = {task for other in suites if other != name for task in _tasks_of(other)}
    own = _tasks_of(name)
    return tuple(task for task in only if task in own or task not in theirs)


def _tasks_of(name: str) -> Iterable[str]:
    suite = named(name)
    return suite.tasks if suite else ()


def record_path(folder: Path, suite: str, model: str, task: str) -> Path:
    """Where a record is; names that hold a slash stay one name.

    >>> record_path(Path("out"), "smoke", "zoo/prose", "recall").as_posix()
    'out/smoke/zoo--prose/recall.jsonl'
    """
    parts = (re.sub(r"[^\w.+-]", "-", name.replace("/", "--")) for name in (suite, model, task))
    suite, model, task = (part.lstrip(".") or "unnamed" for part in parts)
    return folder / suite / model / f"{task}.jsonl"


def measure(
    models: Sequence[Candidate],
    prepared: Sequence[Prepared],
    folder: Path,
    settings: Settings,
    progress: Progress,
    known: dict[str, TaskRecord],
) -> dict[str, list[TaskRecord]]:
    """Let every model answer every task, and write `folder/<suite>/<model>/<task>.jsonl`.

    A task that has its record is not run again, and a model without work is not loaded. Models
    that are the same but for their names are measured once.

    Args:
        known: records that are there, by identity; those that are made are added.

    Returns:
        All records of each model, by its name, those that were there already too.

    Raises:
        EvaluationError: prompts are too long for a model.
        StoreError: a record cannot be written.
    """
    tasks = [task for one in prepared for task in one.tasks]
    for model in models:
        left = [task for task in tasks if _header(task, model, settings).identity not in known]
        loaded: Loaded | None = None
        for number, task in enumerate(left):
            header = _header(task, model, settings)
            record = _of_twin(header, known)
            if record is None:
                if loaded is None:
                    count = len(left) - number
                    progress.say(f"{model.name}: {count} task{'' if count == 1 else 's'} to run")
                    loaded = model.load()
                record = _run(task, loaded, model.facts, settings, progress)
            path = record_path(folder, header.suite, model.name, header.task)
            make_folder(path.parent)
            write_record(path, record)
            known[header.identity] = record
        if loaded is not None:
            del loaded
            _free()
    return {
        model.name: [known[_header(task, model, settings).identity] for task in tasks]
        for model in models
    }


def find_records(
    models: Sequence[Candidate],
    prepared: Sequence[Prepared],
    folder: Path,
    settings: Settings,
    redo: bool = False,
) -> tuple[dict[str, TaskRecord], list[Path]]:
    """The records of models and tasks that are there.

    Returns:
        Records by identity; and the files in whose place others belong, if `redo` is set.

    Raises:
        IdentityError: a record was made from something else, and `redo` is not set.
        StoreError: a file in the place of a record is none.
    """
    known: dict[str, TaskRecord] = {}
    others: dict[Path, list[str]] = {}
    for model in models:
        for task in (task for one in prepared for task in one.tasks):
            header = _header(task, model, settings)
            path = record_path(folder, header.suite, model.name, header.task)
            if not path.exists():
                continue
            record = read_record(path)
            if record.header.identity == header.identity:
                known[header.identity] = record
            else:
                others[path] = _identity(header).differences(_identity(record.header))
    if others and not redo:
        path, differences = next(iter(others.items()))
        more = f" So were {len(others) - 1} more." if len(others) > 1 else ""
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences[:4])}.{more} Give the "
            "settings that it was made with, or add --redo to move such records aside and measure "
            "anew"
        )
    return known, list(others)


def require_room(
    models: Sequence[Candidate],
    prepared: Sequence[Prepared],
    settings: Settings,
    progress: Progress,
    known: Mapping[str, TaskRecord],
) -> None:
    """Check that the prompts of all tasks that are left fit the models that they are left for.

    Raises:
        EvaluationError: some do not, and they are not to be cut.
    """
    tasks = [task for one in prepared for task in one.tasks]
    left = {
        number: [m for m in models if m.ruler and _header(t, m, settings).identity not in known]
        for number, t in enumerate(tasks)
    }
    left = {number: of for number, of in left.items() if of}
    if settings.too_long != "error" or not left:
        return
    with progress.start("checking lengths", len(left), "tasks") as bar:
        for number, of in left.items():
            _require_room_of(tasks[number], of, settings)
            bar.advance()


def _require_room_of(
    task: Task | CodeTask, models: Sequence[Candidate], settings: Settings
) -> None:
    if isinstance(task, CodeTask):
        requests = requests_of_language(task)
    else:
        requests = requests_of(task, settings)
    measured = set()
    for model in models:
        assert model.ruler is not None
        kind = model.facts["tokenizer"], model.ruler.max_length
        if kind in measured:
            continue
        measured.add(kind)
        shown = Watched(model.ruler, "error", Silent(), f"{task.header.suite}/{task.header.task}")
        try:
            shown.require_room(requests)
        except EvaluationError as error:
            raise EvaluationError(f"{model.name}: {error}") from error


def _header(task: Task | CodeTask, model: Candidate, settings: Settings) -> Header:
    return task.of_model(model.facts, settings)


def _run(
    task: Task | CodeTask,
    loaded: Loaded,
    facts: Mapping[str, str],
    settings: Settings,
    progress: Progress,
) -> TaskRecord:
    if isinstance(task, CodeTask):
        return run_language(task, loaded, facts, settings, progress)
    return run_task(task, loaded, facts, settings, progress)


def _identity(header: Header) -> Identity:
    """A header as a stage's identity, to tell how two differ."""
    plain = asdict(header)
    settings = {key: plain[key] for key in ("suite", "task", "protocol", "kind")}
    return Identity("evaluate-suites", settings, header.data | header.model)


def _of_twin(header: Header, known: Mapping[str, TaskRecord]) -> TaskRecord | None:
    """The record of a model that is the same but for its name."""
    for record in known.values():
        if (record.header.suite, record.header.task) != (header.suite, header.task):
            continue
        named_alike = record.header.model | {"name": header.model["name"]}
        if replace(record.header, model=named_alike).identity == header.identity:
            return replace(record, header=replace(record.header, model=named_alike))
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
