"""evaluate, by suites: what every model of a run answers to a benchmark's documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusellm.config import EvaluationSettings
from fusellm.evaluation.comparison import PAIRS, Rules
from fusellm.evaluation.measure import Prepared, candidate
from fusellm.evaluation.settings import settings_of
from fusellm.evaluation.suite_results import measure_into
from fusellm.models.load import Located
from fusellm.progress import Progress
from fusellm.store.files import require_inside
from fusellm.store.run_folder import SUITES


def run_suites(
    run: Path,
    models: Mapping[str, Located],
    prepared: Sequence[Prepared],
    evaluation: EvaluationSettings,
    seed: int,
    progress: Progress,
    redo: bool = False,
) -> None:
    """Measure the models of a run, in the order of the table, and put the suites into its index.

    Raises:
        FusellmError: as `candidate` and `measure_into` do.
    """
    require_inside(run / SUITES, run)
    candidates = [candidate(name, located) for name, located in models.items()]
    measure_into(
        run / SUITES,
        candidates,
        prepared,
        settings_of(evaluation),
        Rules(PAIRS, evaluation.resamplings, seed, evaluation.pass_at),
        evaluation.published,
        progress,
        redo,
    )
