"""What an evaluation found: bits per byte, where they were measured, and suites."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusellm.errors import ArgumentError, StoreError
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.compare.tables import as_json, csv_text, markdown, markdown_section
from fusellm.evaluation.measure import SuiteResults
from fusellm.evaluation.text.intervals import Record
from fusellm.evaluation.text.results import results_table, verdict
from fusellm.store.files import require_writable, write_text
from fusellm.text_table import text_table

ENDINGS = (".md", ".csv", ".json")


@dataclass(frozen=True)
class EvaluationResults:
    """What an evaluation found.

    Attributes:
        records: bits per byte by model and domain, with 95 % intervals over documents. The model
            `fused-clm` is the difference, paired by document. Empty if they were not asked for.
        suites: comparisons on the suites that were measured.
        compared_on: how much of the held-out text the bits per byte are over, where that is known.
    """

    records: tuple[Record, ...]
    suites: tuple[SuiteResults, ...]
    compared_on: str | None = None

    @property
    def verdict(self) -> str:
        """One sentence on whether fusion helped."""
        return verdict(self.records)

    @property
    def published(self) -> bool:
        """Whether the paper's figures are to be shown."""
        return any(one.published for one in self.suites)

    def of(self, model: str, task: str = MEAN) -> Record:
        """A model's bits per byte in a domain, or their mean.

        Raises:
            ArgumentError: there is no such record.
        """
        for record in self.records:
            if (record.model, record.task) == (model, task):
                return record
        known = sorted({f"{record.model}/{record.task}" for record in self.records})
        raise ArgumentError(f"there is no {model}/{task}; known: {', '.join(known)}")

    def as_json(self) -> Any:
        """Plain values: the list of records if there is nothing else, or an object with both."""
        records = [record.as_dict() for record in self.records]
        if records and not self.suites:
            return records
        own = {"lm": records} if records else {}
        return own | as_json([one.comparison for one in self.suites], self.published)

    def save(self, path: Path) -> None:
        """Write the tables as Markdown, CSV or JSON, as the file's name says."""
        comparisons = [one.comparison for one in self.suites]
        if path.suffix == ".json":
            text = json.dumps(self.as_json(), ensure_ascii=False, indent=1) + "\n"
        elif path.suffix == ".csv":
            text = csv_text(comparisons, self.published, [one.as_dict() for one in self.records])
        else:
            text = markdown(comparisons, self.published)
            if self.records:
                notes = [*filter(None, [self.compared_on]), self.verdict]
                text = f"{markdown_section('lm', results_table(self.records), notes)}\n{text}"
        write_text(path, text)

    def __str__(self) -> str:
        table = results_table(self.records)
        return f"{text_table(table.columns, table.rows)}\n{self.verdict}"


def require_savable(paths: Iterable[Path]) -> None:
    """Check before any work that results can be saved in these files.

    Raises:
        StoreError: a name does not end as it must, its folder is not there, or it cannot be
            written.
    """
    for path in paths:
        if path.suffix not in ENDINGS:
            raise StoreError(
                f"--save {path} is no name for a table: end it in {', '.join(ENDINGS)}"
            )
        if not path.absolute().parent.is_dir():
            raise StoreError(f"--save {path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise StoreError(f"--save {path} is a folder; name a file")
        require_writable(path.absolute().parent)
