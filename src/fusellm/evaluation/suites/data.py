"""Finding the data of a benchmark: files in a folder, or the hub where the user allows it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from fusellm.errors import EvaluationError
from fusellm.models.hub import HUB_FAULTS
from fusellm.store.files import file_digest, from_json
from fusellm.store.identity import digest

Row = dict[str, Any]

# How errors name settings, which a run and a check have from a recipe alone.
DATA_DIR = "evaluation.data_dir, or --data-dir of fusellm evaluate"
DOWNLOAD = "evaluation.allow_download: true, or --allow-download of fusellm evaluate"


@dataclass(frozen=True)
class Hub:
    """A split of a dataset on the Hugging Face hub."""

    dataset: str
    config: str | None
    split: str
    revision: str | None = None

    def __str__(self) -> str:
        parts = [self.dataset, *([self.config] if self.config else []), self.split]
        return "hub:" + "/".join(parts)

    def patterns(self) -> tuple[str, ...]:
        """Where a copy of the dataset's repository has the split, below a data folder."""
        folders = (self.dataset, self.dataset.split("/")[1])
        inner = [f"{self.config}/", "data/", ""] if self.config else ["data/", ""]
        files = (f"{self.split}-*.parquet", *(f"{self.split}.{e}" for e in _READERS))
        return tuple(f"{f}/{i}{name}" for f in folders for i in inner for name in files)


@dataclass(frozen=True)
class Origin:
    """Where one input of a task comes from.

    Attributes:
        paths: patterns below a data folder; all matches of the first that has any are read.
        where: where to get it, in words.
        hub: where `datasets` gets it from, if the user allows that.
        keys: alternatives; a row must have all the keys of one of them.
        inside: key of the rows in a JSON object; rows may also be the file's only list.
    """

    paths: tuple[str, ...]
    where: str
    hub: Hub | None = None
    keys: tuple[tuple[str, ...], ...] = ()
    inside: str = "examples"

    @property
    def all_paths(self) -> tuple[str, ...]:
        return self.paths + (self.hub.patterns() if self.hub else ())

    def missing(self, data_dir: Path | None) -> str:
        """That there is no file of it, which one it could be, and where to get it."""
        tried = [path for path in self.all_paths if "*" not in path][:3]
        looked = f"no data folder was given to find {tried[0]} in"
        if data_dir is not None:
            nor = f" (nor {' or '.join(tried[1:])})" if tried[1:] else ""
            looked = f"{data_dir} has no {tried[0]}{nor}"
        download = f", or allow the download: {DOWNLOAD}" if self.hub else ""
        return f"{looked}. Get it from {self.where} and name its folder: {DATA_DIR}{download}"


def of_task(
    task: str, hub: Hub, keys: tuple[tuple[str, ...], ...], paths: tuple[str, ...] = ()
) -> Origin:
    """Origin of rows in the schema of a hub dataset, also as one file named after the task."""
    named = tuple(f"{task}.{ending}" for ending in _READERS)
    where = f"huggingface.co/datasets/{hub.dataset}"
    where += f" ({', '.join([*([hub.config] if hub.config else []), hub.split])})"
    return Origin((*paths, *named), where, hub, keys)


def read_rows(
    origin: Origin, data_dir: Path | None, allow_download: bool = False
) -> tuple[tuple[Row, ...], dict[str, str]]:
    """The rows of an origin, with the SHA-256 of each file by its name in the data folder.

    Raises:
        EvaluationError: there is no file and the hub is not allowed or not reached, a file cannot
            be read, or its rows are not what they should be.
    """
    files = find_files(origin, data_dir)
    if files:
        assert data_dir is not None
        rows = [row for path in files for row in _read(path, origin)]
        digests = {path.relative_to(data_dir).as_posix(): file_digest(path) for path in files}
        _check(rows, origin, ", ".join(digests))
        return tuple(rows), digests
    if origin.hub is None or not allow_download:
        raise EvaluationError(origin.missing(data_dir))
    rows = _download(origin.hub)
    _check(rows, origin, str(origin.hub))
    return tuple(rows), {str(origin.hub): digest(rows)}


def read_text(origin: Origin, data_dir: Path | None) -> tuple[str, dict[str, str]]:
    """The text of an origin that is one file, with the file's digest.

    Raises:
        EvaluationError: it is missing, or no UTF-8.
    """
    files = find_files(origin, data_dir)
    if not files or data_dir is None:
        raise EvaluationError(origin.missing(data_dir))
    content = files[0].read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{files[0]} is no UTF-8 text ({error}); get it again") from error
    name = files[0].relative_to(data_dir).as_posix()
    return text, {name: hashlib.sha256(content).hexdigest()}


def find_files(origin: Origin, data_dir: Path | None) -> list[Path]:
    """The files of an origin, in the order of their names; none where there are none.

    Raises:
        EvaluationError: the data folder is not there.
    """
    if data_dir is None:
        return []
    if not data_dir.is_dir():
        raise EvaluationError(f"there is no data folder {data_dir}; check the path")
    for pattern in origin.all_paths:
        files = sorted(path for path in data_dir.glob(pattern) if path.is_file())
        if files:
            return files
    return []


def _read(path: Path, origin: Origin) -> list[Row]:
    try:
        rows = _READERS[path.suffix.removeprefix(".")](path)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(f"{path} cannot be read ({reason}); get it again") from error
    if isinstance(rows, dict):
        rows = rows.get(origin.inside)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{path} has no list of rows; it should be that of {origin.where}")
    return rows


def _check(rows: Sequence[Row], origin: Origin, place: str) -> None:
    if not rows:
        raise EvaluationError(f"{place} has no rows; it should be that of {origin.where}")
    for number, row in enumerate(rows):
        if origin.keys and not any(row.keys() >= set(keys) for keys in origin.keys):
            wanted = " or ".join(", ".join(keys) for keys in origin.keys)
            raise EvaluationError(
                f"row {number} of {place} has the keys {', '.join(row)}, and needs {wanted}; rows "
                f"should be as in {origin.where}"
            )


def _download(hub: Hub) -> list[Row]:
    import datasets

    try:
        split = datasets.load_dataset(
            hub.dataset, hub.config, split=hub.split, revision=hub.revision
        )
    except (*HUB_FAULTS, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(
            f"{hub} could not be read from the hub ({type(error).__name__}: {reason}); download "
            f"it elsewhere and name its folder: {DATA_DIR}"
        ) from error
    rows: list[Row] = split.to_list()
    return rows


def _json(path: Path) -> Any:
    return from_json(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> Any:
    with path.open(encoding="utf-8") as lines:
        return [from_json(line) for line in lines if line.strip()]


def _parquet(path: Path) -> Any:
    return pyarrow.parquet.read_table(path).to_pylist()


_READERS = {"parquet": _parquet, "jsonl": _json_lines, "json": _json}
