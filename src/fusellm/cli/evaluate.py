"""`fusellm evaluate`: the models of a run, or any models, by suites."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusellm.cli import evaluate_options
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.evaluate_list import show_list
from fusellm.cli.evaluate_screen import show
from fusellm.cli.launch import require_one_process
from fusellm.cli.options import NO_CHANGES, Json, Redo, TrustRemoteCode
from fusellm.cli.run import open_pipeline
from fusellm.errors import EvaluationError, RecipeError
from fusellm.recipe_file import model_settings, open_recipe

if TYPE_CHECKING:
    from fusellm.evaluation.results import EvaluationResults

LM = "lm"
_OUT = Path("runs") / "evaluation"


@evaluate_options.with_settings
def evaluate(
    *,
    places: evaluate_options.Places = None,
    suites: evaluate_options.Suites = None,
    list_suites: evaluate_options.ListSuites = False,
    given: dict[str, Any],
    save_as: evaluate_options.Save = None,
    out: evaluate_options.OutOfEvaluation = None,
    changes: evaluate_options.SetOfEvaluation = NO_CHANGES,
    redo: Redo = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure models by suites, side by side: each source, the target, the CLM baseline, fused.

    Of a run, differences are fused − target and fused − CLM baseline; of models that no run made,
    each model's − the first one's. Both are paired by document, with 95 % intervals. Finished tasks
    are kept: after an interruption, give the same command again. docs/evaluation.md says what each
    suite is and what may be compared with what.

    Examples: `fusellm evaluate runs/demo --suite smoke`,
    `fusellm evaluate zoo/prose zoo/python --suite smoke --limit 20`.
    """
    require_one_process("evaluate")
    named = places or []
    if list_suites:
        show_list(named, given, as_json)
        return
    of_a_run = _are_a_run(named)
    place, asked = Path(named[0]), suites or []
    if of_a_run:  # what is wrong with a recipe is told before torch is imported
        asked = suites or [LM, *open_recipe(place, changes).evaluation.suites]
    elif not asked:
        raise EvaluationError("--suite says what models are measured by; --list shows the suites")
    from fusellm.evaluation.results import require_savable
    from fusellm.stages.evaluate import read_results
    from fusellm.store.run_folder import SUITES

    require_savable(save_as or [])
    if not of_a_run:
        results = _evaluate_models(named, asked, given, out, changes, redo, trust_remote_code)
    else:
        given["suites"] = [suite for suite in dict.fromkeys(asked) if suite != LM]
        pipeline = open_pipeline(place, out, changes, given=given, trusted=trust_remote_code)
        pipeline.execute(("evaluate" if LM in asked else SUITES,), redo)
        results = read_results(pipeline.run, given["suites"], LM in asked)
    print(json_text(results.as_json())) if as_json else show(results, STDOUT)
    for path in save_as or []:
        results.save(path)


def _are_a_run(places: Sequence[str]) -> bool:
    """Whether a run is named, or models.

    Raises:
        EvaluationError: neither is, or both are.
    """
    if not places:
        raise EvaluationError(
            "there is nothing to evaluate: name a run, a recipe, or models; `fusellm evaluate "
            "--list` shows the suites"
        )
    runs = [place for place in places if is_run(place)]
    if runs and len(places) > 1:
        raise EvaluationError(
            f"{runs[0]} is a run or a recipe, which is evaluated alone; name one of these, or "
            "models only"
        )
    return bool(runs)


def is_run(place: str) -> bool:
    """Whether a place is the folder of a run, or a recipe, and not a model."""
    path = Path(place)
    if path.suffix == ".gguf":
        return False
    return path.suffix in (".yaml", ".yml") or path.is_file() or (path / "recipe.yaml").exists()


def _evaluate_models(
    names: Sequence[str],
    suites: Sequence[str],
    given: Mapping[str, Any],
    out: Path | None,
    changes: Sequence[str],
    redo: bool,
    trusted: bool,
) -> "EvaluationResults":
    from fusellm.evaluation.models import evaluate as evaluate_models
    from fusellm.evaluation.results import EvaluationResults
    from fusellm.models.remote_code import require_trusted

    if len(set(names)) < len(names):
        raise RecipeError(f"a model is named twice: {', '.join(names)}; name each once")
    shown, models = Terminal(STDERR), {}
    for name in names:
        model = model_settings(name, [*changes, *["trust_remote_code=true"] * trusted])
        require_trusted(model, trusted, shown)
        models[name] = model.model_dump()
    measured = evaluate_models(
        models,
        suites,
        out=out or _OUT,
        redo=redo,
        trust_remote_code=trusted,
        progress=shown,
        **given,
    )
    return EvaluationResults((), tuple(measured))
