"""What a model answered to each document of a task, with all that the answers depend on.

A task's record is one JSONL file: a header, then a line for each document or sample. It is written
whole, so that a file that is there is a task that is finished.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusellm.errors import StoreError
from fusellm.store.files import from_json, write_text
from fusellm.store.identity import digest

Kind = Literal["binary", "value", "samples", "bleu"]


@dataclass(frozen=True)
class Header:
    """What a task's scores depend on.

    Attributes:
        suite, task: their names.
        protocol: everything about the task that changes a score: prompt, examples, stop strings,
            metric, generation settings. Scores of different protocols are not compared.
        kind: what `Answer.score` is: 0 or 1 (binary); any number, averaged (value); 0 or 1 of one
            of several samples of a document (samples); unused, the response being a translation
            that is scored with the others of its corpus (bleu).
        data: SHA-256 of each file that was read, by its name.
        model: name, fingerprint of weights, fingerprint of tokenizer, precision.
        software: versions.
    """

    suite: str
    task: str
    protocol: dict[str, Any]
    kind: Kind
    data: dict[str, str]
    model: dict[str, str]
    software: dict[str, str] = field(default_factory=dict)

    @property
    def compared_by(self) -> str:
        """Digest of what two models must have in common for their scores to be compared."""
        return digest([self.suite, self.task, self.protocol, self.kind, self.data])

    @property
    def identity(self) -> str:
        """Digest of everything that the answers depend on; software is only told."""
        return digest([self.compared_by, self.model])


@dataclass(frozen=True)
class Answer:
    """One document, or one sample of it.

    Attributes:
        document: digest of the document; equal for all samples of one.
        prompt: digest of the prompt.
        response: what the model wrote, or the choice that it took.
        score: higher is better.
        truncated: whether the prompt had to be cut to fit the model's context.
        reference: of a translation.
        reason: why a program failed, or an answer could not be read; empty otherwise.
        others: the task's further measures of the document, by name; only told.
    """

    document: str
    prompt: str
    response: str
    score: float
    truncated: bool = False
    sample: int = 0
    reference: str = ""
    reason: str = ""
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRecord:
    """A task's header and its answers, in the order of its documents."""

    header: Header
    answers: tuple[Answer, ...]


def write_record(path: Path, record: TaskRecord) -> None:
    """Write a record so that it is there whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    lines: Iterable[Any] = [asdict(record.header), *(asdict(a) for a in record.answers)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_record(path: Path) -> TaskRecord:
    """Read a record.

    Raises:
        StoreError: the file is none.
    """
    try:
        first, *rest = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        return TaskRecord(
            Header(**from_json(first)), tuple(Answer(**from_json(line)) for line in rest)
        )
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is no record of a task ({error}); remove it") from error
