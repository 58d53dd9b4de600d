"""What every model of a run writes behind the same beginnings, in a small file in its folder.

It says nothing that is needed; the report shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from fusellm.store.files import write_text
from fusellm.store.run_folder import CONTINUATIONS


@dataclass(frozen=True)
class Beginning:
    """A text that is gone on with.

    Attributes:
        domain: of its document.
        shown: of it, for people; of a conversation what is said in it.
        truth: how the document goes on.
    """

    domain: str
    shown: str
    truth: str


@dataclass(frozen=True)
class ModelText:
    """What a model wrote.

    Attributes:
        text: of it.
        ends: whether the model has ended it.
        missing: why there is none; None where there is one.
    """

    text: str
    ends: bool = False
    missing: str | None = None


@dataclass(frozen=True)
class ModelTexts:
    """A model's continuations, one for each beginning; `made_from` is a digest of the model."""

    made_from: str
    texts: list[ModelText]


@dataclass(frozen=True)
class ContinuedTexts:
    """Those of all models, by their names; `made_from` is a digest of what the beginnings are."""

    made_from: str
    beginnings: list[Beginning]
    models: Mapping[str, ModelTexts] = field(default_factory=dict)


_FILE = TypeAdapter(ContinuedTexts)


def continuations_of(run: Path) -> ContinuedTexts | None:
    """What is known; None where there is no such file, or it is damaged."""
    try:
        known = _FILE.validate_json((run / CONTINUATIONS).read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
    whole = all(len(one.texts) == len(known.beginnings) for one in known.models.values())
    return known if whole else None


def write_continuations(run: Path, continuations: ContinuedTexts) -> None:
    """Keep them in a run's folder.

    Raises:
        StoreError: it cannot be written.
    """
    write_text(run / CONTINUATIONS, _FILE.dump_json(continuations, indent=1).decode() + "\n")
