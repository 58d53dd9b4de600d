"""A study from its file to its page."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fusellm.models.remote_code import require_trusted
from fusellm.progress import Progress, Silent
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.store.files import write_text
from fusellm.study.execute import Execution
from fusellm.study.page import study_page
from fusellm.study.plan import load_study
from fusellm.study.results import StudyResults, results_of

PAGE, JSON = "study.md", "study.json"


def run_study(
    file: str | PathLike[str],
    out: str | PathLike[str],
    *,
    arms: Sequence[str] = (),
    jobs: int = 1,
    redo: bool = False,
    trust_remote_code: bool = False,
    engine: EngineSettings = LOCAL,
    progress: Progress | None = None,
) -> StudyResults:
    """Train what is not trained yet, and write `study.md` and `study.json`.

    Args:
        file: of the study.
        out: its folder; finished trainings in it are kept.
        arms: only these, the reference and whatever they need; all if empty.
        jobs: trainings at a time, each in a process of its own if there are several.
        redo: move what was made from other settings aside, in place of an error.
        trust_remote_code: whether code that models bring along may run.
        engine: where sources are read and models trained; on Ray, its workers say how many at a
            time, and `out` must be on a file system that all machines of the cluster share.
        progress: shown how far it is; if None, nothing is.

    Raises:
        FusellmError: the study or an arm cannot be used, or something in the folder is damaged.

    >>> run_study("recipes/study-zoo.yaml", "runs/study").as_json()  # doctest: +SKIP
    """
    study, shown = load_study(Path(file), arms), progress or Silent()
    for model in (study.base.target, *study.base.sources):
        require_trusted(model, trust_remote_code, shown)
    folder = Path(out)
    how: dict[str, Any] = {"jobs": jobs, "redo": redo, "trusted": trust_remote_code}
    work = Execution(study, folder, shown, engine=engine, **how)
    results = results_of(work.run())
    write_text(folder / PAGE, study_page(study, results))
    figures = json.dumps(results.as_json(), ensure_ascii=False)
    write_text(folder / JSON, figures + "\n")
    return results
