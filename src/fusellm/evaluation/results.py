"""What an evaluation found: bits per byte, where they were measured, and suites."""

from dataclasses import dataclass

from fusellm.errors import ArgumentError
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.measure import SuiteResults
from fusellm.evaluation.text.intervals import Record
from fusellm.evaluation.text.results import results_table, verdict
from fusellm.text_table import text_table


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

    def __str__(self) -> str:
        table = results_table(self.records)
        return f"{text_table(table.columns, table.rows)}\n{self.verdict}"
