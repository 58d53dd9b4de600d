"""Around lm_eval: its import, its messages and the random numbers that it draws."""

import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fusellm.errors import EvaluationError

SEED = 1234
"""Of examples that are drawn, and of writing that is sampled; lm_eval's own."""


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


@contextmanager
def silently_building(task: Any) -> Iterator[None]:
    """Without lm_eval's bar while it builds its requests; ours go on being shown."""
    build = task.build_all_requests

    def built(**arguments: Any) -> None:
        with redirect_stderr(io.StringIO()):
            build(**arguments)

    task.build_all_requests = built
    try:
        yield
    finally:
        del task.build_all_requests


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm_eval's and datasets' messages short of errors, and datasets' bars."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """With all generators of random numbers at `SEED`, and as they were afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
