"""The model card of a merged model: of which models it is, and the command that makes it."""

import html
import re
import shlex
from collections.abc import Sequence

import yaml

from fusellm.merging.opened import Opened
from fusellm.merging.settings import METHODS, MergeSettings
from fusellm.models.cards import without_folders
from fusellm.models.load import describe

_MARKS = re.compile(r"([\\`*_{}\[\]|~#])")
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def merge_card(settings: MergeSettings, models: Sequence[Opened], base: Opened | None) -> str:
    """The card, in Markdown; folders of this machine by their names alone."""
    method = METHODS[settings.method]
    everyone = [*models, *([base] if base is not None else [])]
    hub = [m.located.settings.model for m in everyone if m.located.commit is not None]
    front = {"library_name": "transformers", "tags": ["fusellm", "merge"]}
    if hub:
        front |= {"base_model": list(dict.fromkeys(hub)), "base_model_relation": "merge"}
    weights = [f"{weight:g}" for weight in settings.weights or ()] or [""] * len(models)
    rows = [("model", m, w) for m, w in zip(models, weights, strict=True)]
    rows += [("base", base, "")] if base is not None else []
    table = "\n".join(_row(role, model, weight) for role, model, weight in rows)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
        f"# Merged by fusellm: {_plain(settings.method)}\n\n"
        f"The weights of {len(models)} models, merged without training: {method.what} "
        f"({method.source}).\n\n"
        "| role | model | weight | revision | architecture | fingerprint |\n"
        f"|---|---|---|---|---|---|\n{table}\n\n"
        "What their licences ask for holds for this model too.\n\n"
        f"## Made by\n\n    {_BREAKS.sub(' ', command(settings, models, base))}\n"
    )


def command(settings: MergeSettings, models: Sequence[Opened], base: Opened | None) -> str:
    """The command that makes it again, with the numbers that a method has by itself too."""
    words = ["fusellm", "merge", *(_name(model) for model in models), "--method", settings.method]
    words += ["--base", _name(base)] if base is not None else []
    for weight in settings.weights or ():
        words.append(f"--weight={weight!r}")
    for option in ("density", "scale", "t", "seed"):
        value = getattr(settings, option)
        if value is not None:
            words.append(f"--{'lambda' if option == 'scale' else option}={value!r}")
    return shlex.join([*words, "--out", "DIR"])


def _name(model: Opened) -> str:
    return str(without_folders(model.name))


def _row(role: str, model: Opened, weight: str) -> str:
    said = describe(model.located)
    cells = [role, _name(model), weight, said["revision"] or said["commit"] or ""]
    cells += [said["architecture"]]
    return f"| {' | '.join(_plain(cell) for cell in cells)} | `{said['fingerprint'][:16]}` |"


def _plain(text: str) -> str:
    r"""A text that Markdown and HTML show as it is, in one line.

    >>> _plain("a|b <i>*c*\n")
    'a\\|b &lt;i&gt;\\*c\\* '
    """
    return _MARKS.sub(r"\\\1", html.escape(_BREAKS.sub(" ", text), quote=False))
