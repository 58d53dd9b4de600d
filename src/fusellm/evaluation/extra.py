"""Modules of the extra `eval`, imported where they are used."""

from importlib import import_module
from typing import Any

from fusellm.errors import EvaluationError


def extra(module: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise EvaluationError(
            f"{module.partition('.')[0]} is needed to evaluate by suites and cannot be imported "
            f"({error}); pip install 'fusellm[eval]'"
        ) from error
