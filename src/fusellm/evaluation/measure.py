"""Models measured by suites, one in memory at a time and nothing twice; and what came of it.

A suite's records are in a folder, with `index.json`, which says for each suite which models
answered which tasks, with the identity of each record, what was not run and why, and by which rules
models are compared.
"""

import gc
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError, IdentityError, StoreError
from fusellm.evaluation.code.tasks import CODE_SUITES, prepare_languages
from fusellm.evaluation.compare.comparison import Comparison, NotRun, Rules, compare
from fusellm.evaluation.compare.records import Header, TaskRecord, read_record, write_record
from fusellm.evaluation.harness.model import LoadedModel, MeasuredModel, Ruler, require_readable
from fusellm.evaluation.harness.run import Task
from fusellm.evaluation.suites.catalogue import named
from fusellm.evaluation.suites.load import tasks_of
from fusellm.models.headers import require_loadable
from fusellm.models.load import Located, default_device, load_model, load_tokenizer
from fusellm.models.readers import chat_template_of
from fusellm.progress import Progress, Silent
from fusellm.store.files import make_folder, write_text
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import first_fault
from fusellm.store.run_folder import INDEX
from fusellm.store.writer import set_aside
from fusellm.text_table import counted
from fusellm.tokens.chat import on_one_day


@dataclass(frozen=True)
class SuiteResults:
    """A suite's comparison, and whether the paper's figures are shown beside it."""

    comparison: Comparison
    published: bool


@dataclass(frozen=True)
class _Entry:
    """What the index says of a suite: of each model the identities of its records, by task."""

    models: dict[str, dict[str, str]]
    not_run: tuple[NotRun, ...]
    rules: Rules
    published: bool


_INDEX = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class Candidate:
    """A model that is to be measured.

    Attributes:
        facts: what `Header.model` says of it; its `name` names the folder of its records.
        ruler: tells whether prompts fit before it is loaded; None where any do.
    """

    facts: Mapping[str, str]
    load: Callable[[], LoadedModel]
    ruler: Ruler | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.facts["name"]


@dataclass(frozen=True)
class PreparedSuite:
    """A suite whose data, packages and sandbox have been found."""

    suite: str
    tasks: tuple[Task, ...]
    not_run: tuple[NotRun, ...] = ()


def candidate(name: str, located: Located, chat: bool = False) -> Candidate:
    """A model that has been found, to be loaded when it is needed.

    Args:
        chat: whether it is asked by its chat template.

    Raises:
        EvaluationError: lm_eval cannot use its tokenizer, or it has no chat template and is to be
            asked by one.
        ModelError: its tokenizer, or a package that it is loaded with, is missing, or its files
            are not what they should be.
    """
    require_loadable(located)

    def read() -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(located)
        if chat and (template := chat_template_of(located, tokenizer)) is not None:
            tokenizer.chat_template = on_one_day(template)
        return tokenizer

    tokenizer = read()
    require_readable(tokenizer)
    if chat and not tokenizer.chat_template:
        raise EvaluationError(
            f"{name} has no chat template, and is to be asked by one; give it one as chat_template "
            "(of a recipe's model, or --set chat_template=FILE.jinja), or leave chat out"
        )
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    specials = tokenizer.special_tokens_map
    facts = {
        "name": name,
        "weights": located.fingerprint,
        "tokenizer": digest([type(tokenizer).__name__, rules, specials]),
        "precision": located.settings.precision,
    }
    told = located.settings.system if chat else None
    if chat:
        facts["chat_template"] = digest([tokenizer.chat_template, told])

    def load() -> LoadedModel:
        model = load_model(located, default_device())
        return LoadedModel(model, read(), located.context_tokens, told)

    context = located.context_tokens
    ruler = None if context is None else Ruler(tokenizer, context, system=told)
    return Candidate(facts, load, ruler)


def prepare(
    suites: Sequence[str], settings: EvaluationSettings, progress: Progress
) -> list[PreparedSuite]:
    """Find the data, packages and sandbox of suites, before any model is loaded.

    `settings.tasks` are tasks of any of them; each suite runs those that it has.

    Raises:
        EvaluationError: something is missing, or a name is unknown.
    """
    prepared = []
    for name in dict.fromkeys(suites):
        own = settings.model_copy(update={"tasks": _tasks_for(name, suites, settings.tasks)})
        if name in CODE_SUITES:
            if settings.chat:
                raise EvaluationError(
                    f"{name} asks models to go on with programs, which are no conversations; "
                    "measure it without chat"
                )
            prepared.append(
                PreparedSuite(name, *prepare_languages(CODE_SUITES[name], own, progress))
            )
        else:
            prepared.append(PreparedSuite(name, tuple(tasks_of(name, own))))
    return prepared


def _tasks_for(name: str, suites: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Of the tasks that are asked for those that this suite has, or that no other one has."""
    elsewhere = {task for other in suites if other != name for task in _tasks_of(other)}
    own = _tasks_of(name)
    return [task for task in tasks if task in own or task not in elsewhere]


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


def measure_into(
    folder: Path,
    models: Sequence[Candidate],
    prepared: Sequence[PreparedSuite],
    rules: Rules,
    published: bool,
    progress: Progress,
    redo: bool = False,
) -> None:
    """Measure models by suites, and put these into the index of the records' folder.

    While records change, their suites are not in the index.

    Raises:
        FusellmError: as `find_records`, `require_room` and `measure` do.
    """
    known, others = find_records(models, prepared, folder, redo)
    require_room(models, prepared, progress, known)
    if others:
        place = set_aside(folder, others)
        progress.say(f"moved {len(others)} records made from something else to {place}")
    suites = [one.suite for one in prepared]
    make_folder(folder)
    _write(folder, {name: entry for name, entry in _read(folder).items() if name not in suites})
    records = measure(models, prepared, folder, progress, known)
    entries = {
        one.suite: _Entry(
            {
                model: {
                    record.header.task: record.header.identity
                    for record in of_model
                    if record.header.suite == one.suite
                }
                for model, of_model in records.items()
            },
            one.not_run,
            rules,
            published,
        )
        for one in prepared
    }
    _write(folder, _read(folder) | entries)


def measure(
    models: Sequence[Candidate],
    prepared: Sequence[PreparedSuite],
    folder: Path,
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
        left = [task for task in tasks if task.of_model(model.facts).identity not in known]
        loaded: LoadedModel | None = None
        for number, task in enumerate(left):
            header = task.of_model(model.facts)
            record = _of_twin(header, known)
            if record is None:
                if loaded is None:
                    count = len(left) - number
                    progress.say(f"{model.name}: {counted(str(count), 'tasks')} to run")
                    loaded = model.load()
                record = task.run(loaded, model.facts, progress)
            path = record_path(folder, header.suite, model.name, header.task)
            make_folder(path.parent)
            write_record(path, record)
            known[header.identity] = record
        if loaded is not None:
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {
        model.name: [known[task.of_model(model.facts).identity] for task in tasks]
        for model in models
    }


def find_records(
    models: Sequence[Candidate], prepared: Sequence[PreparedSuite], folder: Path, redo: bool = False
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
            header = task.of_model(model.facts)
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
    prepared: Sequence[PreparedSuite],
    progress: Progress,
    known: Mapping[str, TaskRecord],
) -> None:
    """Check that the prompts of all tasks that are left fit the models that they are left for.

    Raises:
        EvaluationError: some do not, and they are not to be cut.
    """
    left: list[tuple[Task, list[Candidate]]] = []
    for task in (task for one in prepared for task in one.tasks):
        of = [m for m in models if m.ruler and task.of_model(m.facts).identity not in known]
        if of and task.settings.too_long == "error":
            left.append((task, of))
    if left:
        with progress.start("checking lengths", len(left), "tasks") as bar:
            for task, of in left:
                _require_room_of(task, of)
                bar.advance()


def _require_room_of(task: Task, models: Sequence[Candidate]) -> None:
    chat = task.settings.chat
    requests = [] if chat else task.requests()
    rulers: dict[tuple[str, str | None, int], Candidate] = {}
    for model in models:
        assert model.ruler is not None
        template = model.facts.get("chat_template")
        rulers.setdefault((model.facts["tokenizer"], template, model.ruler.max_length), model)
    for model in rulers.values():
        assert model.ruler is not None
        if chat:
            requests = task.requests(model.ruler.apply_chat_template, model.ruler.system)
        try:
            MeasuredModel(model.ruler, "error", Silent(), task.place).require_room(requests)
        except EvaluationError as error:
            raise EvaluationError(f"{model.name}: {error}") from error


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


def read_suites(folder: Path, suites: Sequence[str] | None = None) -> list[SuiteResults]:
    """The comparisons of a folder's suites, in the order in which they were measured.

    Args:
        suites: only these; all if None.

    Raises:
        StoreError: the index or a record is missing, damaged, or not of the index.
        EvaluationError: models cannot be compared, or the extra `eval` is not installed.
    """
    results = []
    for suite, entry in _read(folder).items():
        if suites is None or suite in suites:
            records = {
                model: [_record(folder, suite, model, *task) for task in tasks.items()]
                for model, tasks in entry.models.items()
            }
            (comparison,) = compare(records, entry.rules, entry.not_run)
            results.append(SuiteResults(comparison, entry.published))
    return results


def _record(folder: Path, suite: str, model: str, task: str, identity: str) -> TaskRecord:
    path = record_path(folder, suite, model, task)
    record = read_record(path)
    if record.header.identity != identity:
        raise StoreError(
            f"{path} is not the record that {folder / INDEX} speaks of; run `fusellm evaluate` "
            f"with --suite {suite} again"
        )
    return record


def _read(folder: Path) -> dict[str, _Entry]:
    path = folder / INDEX
    try:
        return _INDEX.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = first_fault(error) if isinstance(error, ValidationError) else repr(error)
        raise StoreError(
            f"{path} is damaged ({why}); remove it and run `fusellm evaluate` with --suite again: "
            "records are kept"
        ) from error


def _write(folder: Path, index: dict[str, _Entry]) -> None:
    plain = _INDEX.dump_python(index, mode="json")
    write_text(folder / INDEX, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
