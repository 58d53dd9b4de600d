"""Model cards of trained models: from what and how they were made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fusellm.config import ObjectiveSettings, Recipe
from fusellm.models.load import Located, describe


def training_card(
    recipe: Recipe, which: str, target: Located, sources: Sequence[tuple[str, Located]]
) -> str:
    """The card of the fused model, or of the CLM baseline.

    Args:
        which: "fused" or "clm".
    """
    lora = recipe.training.lora
    library = "transformers" if lora is None or lora.merge else "peft"
    front: dict[str, Any] = {"library_name": library, "tags": ["fusellm", which]}
    if target.commit is not None:  # of the hub
        front["base_model"] = target.settings.model
    rows = [("target", target), *sources] if which == "fused" else [("target", target)]
    table = "\n".join(
        f"| {name} | {_cell(without_folders(row['model']))} | {_cell(row['revision'] or '')} | "
        f"{row['architecture']} | `{row['fingerprint'][:16]}` |"
        for name, located in rows
        for row in [describe(located)]
    )
    objective = (
        f"L = λ·L_CLM + (1−λ)·L_Fusion with λ = {_lambda(recipe.objective)} "
        "(*Knowledge Fusion of Large Language Models*, arXiv 2401.10491)"
        if which == "fused"
        else "L_CLM alone (λ = 1): the run's baseline, over the same text in the same order"
    )
    settings = without_folders(
        recipe.model_dump(mode="json", by_alias=True, exclude={"target", "sources"})
    )
    listing = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# {recipe.name}: {which}\n\nTrained by fusellm on {objective}.\n\n"
        "| role | model | revision | architecture | fingerprint |\n|---|---|---|---|---|\n"
        f"{table}\n\n## Settings\n\n```yaml\n{listing}```\n"
    )


def _lambda(objective: ObjectiveSettings) -> str:
    """
    >>> _lambda(ObjectiveSettings(lambda_=0.5, lambda_schedule="linear", lambda_end=0.9))
    '0.5 to 0.9 (linear)'
    """
    if objective.lambda_schedule == "constant":
        return f"{objective.lambda_:g}"
    end = 1.0 if objective.lambda_end is None else objective.lambda_end
    return f"{objective.lambda_:g} to {end:g} ({objective.lambda_schedule})"


def without_folders(value: Any) -> Any:
    """A setting with files of this machine by their names alone: a card is made to be shown.

    >>> without_folders({"files": ["/home/me/notes/*.md"], "model": "owner/name"})
    {'files': ['*.md'], 'model': 'owner/name'}
    """
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
