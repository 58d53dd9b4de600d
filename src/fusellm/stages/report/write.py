"""The report of a run: its results as JSON and CSV, and one page to read."""

import csv
import io
import json
from pathlib import Path

from fusellm.evaluation.compare.tables import flat_rows
from fusellm.evaluation.text.results import COLUMNS
from fusellm.stages.report.page import render
from fusellm.stages.report.reading import read_run
from fusellm.stages.stage import Stage
from fusellm.store.files import alone_in, make_folder, require_inside, write_text


class ReportStage(Stage):
    """The folder `report`: made anew each time, from what is there."""

    command = "report"

    def execute(self, redo: bool) -> None:
        """Write the report."""
        write_report(self.context.run)


def write_report(run: Path) -> None:
    """Write `report/results.json`, `results.csv` and `index.html` from a run's folder.

    The same run gives the same bytes; a report that has them is left as it is.

    Raises:
        StoreError: the results or the counts of fusion are missing, a file is damaged, or the
            report cannot be written.
        EvaluationError: there are suites, and the extra `eval`, which compares them, is missing.
    """
    read = read_run(run)
    page = render(read)
    records = [
        *(record.as_dict() for record in read.records),
        *(
            {key: row.get(key) for key in COLUMNS} | {"task": f"{row['suite']}/{row['task']}"}
            for one in read.suites
            for row in flat_rows(one.comparison)
        ),
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    folder = run / "report"
    require_inside(folder, run)
    make_folder(folder)
    with alone_in(folder):
        body = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        write_text(folder / "results.json", body)
        write_text(folder / "results.csv", table.getvalue())
        write_text(folder / "index.html", page)
