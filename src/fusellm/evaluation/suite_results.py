"""Which records of a folder belong together, and the comparison of their models.

`index.json` says for each suite which models answered which tasks, with the identity of each
record, what was not run and why, and by which rules models are compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusellm.errors import StoreError
from fusellm.evaluation.comparison import Comparison, NotRun, Rules, compare
from fusellm.evaluation.measure import (
    Candidate,
    Prepared,
    find_records,
    measure,
    record_path,
    require_room,
)
from fusellm.evaluation.records import TaskRecord, read_record
from fusellm.evaluation.settings import Settings
from fusellm.progress import Progress
from fusellm.store.files import from_json, make_folder, write_text
from fusellm.store.run_folder import INDEX
from fusellm.store.writer import set_aside


@dataclass(frozen=True)
class SuiteResults:
    """A suite's comparison, and whether the paper's figures are shown beside it."""

    comparison: Comparison
    published: bool


def measure_into(
    folder: Path,
    models: Sequence[Candidate],
    prepared: Sequence[Prepared],
    settings: Settings,
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
    known, others = find_records(models, prepared, folder, settings, redo)
    require_room(models, prepared, settings, progress, known)
    if others:
        place = set_aside(folder, others)
        progress.say(f"moved {len(others)} records made from something else to {place}")
    suites = [one.suite for one in prepared]
    make_folder(folder)
    _write(folder, {name: entry for name, entry in _read(folder).items() if name not in suites})
    records = measure(models, prepared, folder, settings, progress, known)
    entries = {
        one.suite: {
            "models": {
                model: {
                    record.header.task: record.header.identity
                    for record in of_model
                    if record.header.suite == one.suite
                }
                for model, of_model in records.items()
            },
            "not_run": [asdict(entry) for entry in one.not_run],
            "rules": asdict(rules),
            "published": published,
        }
        for one in prepared
    }
    _write(folder, _read(folder) | entries)


def read_suites(folder: Path, suites: Sequence[str] | None = None) -> list[SuiteResults]:
    """The comparisons of a folder's suites, in the order in which they were measured.

    Args:
        suites: only these; all if None.

    Raises:
        StoreError: the index or a record is missing, damaged, or not of the index.
        EvaluationError: models cannot be compared, or the extra `eval` is not installed.
    """
    found = []
    for suite, entry in _read(folder).items():
        if suites is not None and suite not in suites:
            continue
        try:
            rules = Rules(
                **(entry["rules"] | {"pairs": [tuple(p) for p in entry["rules"]["pairs"]]})
            )
            not_run = [NotRun(**one) for one in entry["not_run"]]
            models = {model: dict(tasks) for model, tasks in entry["models"].items()}
            published = bool(entry["published"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, error) from error
        records = {
            model: [_record(folder, suite, model, task, identity) for task, identity in of.items()]
            for model, of in models.items()
        }
        (comparison,) = compare(records, rules, not_run)
        found.append(SuiteResults(comparison, published))
    return found


def _record(folder: Path, suite: str, model: str, task: str, identity: str) -> TaskRecord:
    path = record_path(folder, suite, model, task)
    record = read_record(path)
    if record.header.identity != identity:
        raise StoreError(
            f"{path} is not the record that {folder / INDEX} speaks of; run `fusellm evaluate` "
            f"with --suite {suite} again"
        )
    return record


def _read(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(index, dict):
        raise _damaged(folder, TypeError("no object"))
    return index


def _write(folder: Path, index: Mapping[str, Any]) -> None:
    write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _damaged(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{folder / INDEX} is damaged ({error!r}); remove it and run `fusellm evaluate` with "
        "--suite again: records are kept"
    )
