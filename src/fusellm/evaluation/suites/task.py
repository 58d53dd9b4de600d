"""What a task of a suite is, before its data is read and after."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusellm.evaluation.compare.records import Kind
from fusellm.evaluation.suites.data import Origin, Row


@dataclass(frozen=True)
class Definition:
    """A task as lm_eval is to run it.

    Attributes:
        split: name of the split that `rows` are.
        config: lm_eval's keys of a task; over those of `stock`, where it has one.
        stock: file of the task below lm_eval's own tasks.
        notes: what the protocol has that its name does not say; a part of the protocol.
        unread: why an answer cannot be read from a response; empty where it can.
    """

    rows: tuple[Row, ...]
    config: dict[str, Any]
    split: str = "test"
    stock: str | None = None
    notes: tuple[str, ...] = ()
    unread: Callable[[str], str] = field(default=lambda _: "")


@dataclass(frozen=True)
class Inputs:
    """What was read for a task: rows by the name of their origin, and texts."""

    rows: Mapping[str, tuple[Row, ...]]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """A task of a suite.

    Attributes:
        metric: the headline measure, higher being better, of lm_eval's filter `filter`.
        documents: how many the benchmark has.
        define: makes the definition from the inputs.
        rows, texts: origins of the inputs.
    """

    name: str
    metric: str
    kind: Kind
    documents: int
    define: Callable[[Inputs], Definition]
    rows: Mapping[str, Origin] = field(default_factory=dict)
    texts: Mapping[str, Origin] = field(default_factory=dict)
    filter: str = "none"
