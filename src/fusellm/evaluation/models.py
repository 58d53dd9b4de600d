"""Models that no run made, measured by suites and compared."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from fusellm.config import EvaluationSettings, ModelSettings
from fusellm.errors import ArgumentError, EvaluationError, ModelError
from fusellm.evaluation.compare.comparison import Rules
from fusellm.evaluation.measure import (
    SuiteResults,
    candidate,
    measure_into,
    prepare,
    read_suites,
)
from fusellm.models.load import Located, locate
from fusellm.progress import Progress, Silent
from fusellm.recipe_file import checked_settings

LM = "lm"


def evaluate(
    models: Sequence[str] | Mapping[str, str | Mapping[str, Any]],
    suites: Sequence[str],
    *,
    data_dir: str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    redo: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> list[SuiteResults]:
    """Measure models by suites; each but the first is compared with the first.

    Differences are paired by document, with 95 % intervals, Holm's correction, and the smallest
    difference that could be shown. docs/evaluation.md says what each suite is.

    Args:
        models: folders, GGUF files, hub names or zoo/NAME; or these by the name that results call
            them, each with what a recipe's `target:` may say besides (`{"model": ..., "dtype":
            "bfloat16"}`).
        suites: `fusellm evaluate --list` shows them.
        data_dir: folder that data is looked for in.
        out: folder that finished tasks are kept in, so that a second call goes on; none are if
            None.
        redo: move what was made from something else aside, in place of an error.
        trust_remote_code: whether code that models bring along may run.
        progress: is shown how far it is.
        settings: others of a recipe's `evaluation:`, such as `limit`, `batch_size` and `tasks`.

    Returns:
        Of each suite its `comparison`.

    Raises:
        ArgumentError: there is no such setting, or it has a wrong value.
        EvaluationError: data or packages (`fusellm[eval]`) of a suite are missing.
        ModelError: a model cannot be found or loaded.

    >>> (smoke,) = evaluate(["zoo/prose", "zoo/cpp"], ["smoke"], limit=4)  # doctest: +SKIP
    """
    named = _named(models, suites)
    given = settings | ({} if data_dir is None else {"data_dir": str(Path(data_dir).absolute())})
    evaluation = checked_settings(EvaluationSettings, given)
    shown = progress or Silent()
    candidates = [
        candidate(name, _located(model, trust_remote_code), evaluation.chat)
        for name, model in named.items()
    ]
    prepared = prepare(suites, evaluation, shown)
    first, *others = named
    rules = Rules(
        tuple((name, first) for name in others), evaluation.resamplings, pass_at=evaluation.pass_at
    )
    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
        measure_into(folder, candidates, prepared, rules, evaluation.published, shown, redo)
        return read_suites(folder, suites)


def _named(
    models: Sequence[str] | Mapping[str, str | Mapping[str, Any]], suites: Sequence[str]
) -> Mapping[str, str | Mapping[str, Any]]:
    """Models by the name that results call them.

    Raises:
        ArgumentError, EvaluationError: there are none, one twice, or no suite that models have.
    """
    for given, value in (("models", models), ("suites", suites)):
        if isinstance(value, str):
            raise ArgumentError(f"{given} is one name; give a list of them")
    named = models if isinstance(models, Mapping) else {name: name for name in models}
    if not isinstance(models, Mapping) and len(named) < len(models):
        raise ArgumentError(f"a model is named twice: {', '.join(models)}; name each once")
    if not suites or not named:
        raise EvaluationError("name at least one model and one suite")
    if LM in suites:
        raise EvaluationError(
            "the suite lm is of a run's held-out text, and these are models; name a run or a "
            "recipe, or another suite"
        )
    return named


def _located(model: str | Mapping[str, Any], trusted: bool) -> Located:
    """A model by its name, or as a recipe's `target:` has it."""
    block = {"model": model} if isinstance(model, str) else dict(model)
    _require_place(str(block.get("model", "")))
    settings = checked_settings(ModelSettings, {"trust_remote_code": trusted} | block)
    return locate(settings, trusted)


def _require_place(name: str) -> None:
    """Check that a folder holds a model.

    Raises:
        ModelError: it does not.
    """
    patterns = ("*config.json", "*.gguf")
    if Path(name).is_dir() and not any(any(Path(name).glob(p)) for p in patterns):
        raise ModelError(
            f"{name} is neither a run (it has no recipe.yaml) nor a model (no config.json); "
            "check the path"
        )
