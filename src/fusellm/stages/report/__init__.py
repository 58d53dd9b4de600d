"""The report of a run: its results as JSON and CSV, and one page to read."""

import csv
import io
import json
import os
from pathlib import Path

from fusellm.stages.report.page import render
from fusellm.stages.report.reading import read_run
from fusellm.stages.report.results import COLUMNS, results_table, suite_records, verdict

__all__ = ["results_table", "verdict", "write_report"]


def write_report(run: Path) -> None:
    """Write `report/results.json`, `results.csv` and `index.html` from a run's folder.

    The same run gives the same bytes.

    Raises:
        StoreError: the results or the counts of fusion are missing, or a file is damaged.
        EvaluationError: there are suites, and the extra `eval`, which compares them, is missing.
    """
    read = read_run(run)
    page = render(read)
    records = [
        *read.records,
        *(row for one in read.suites for row in suite_records(one.comparison)),
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    folder = run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "results.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "results.csv", table.getvalue())
    _replace(folder / "index.html", page)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)  # os.replace
    finally:
        temporary.unlink(missing_ok=True)
