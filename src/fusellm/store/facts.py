"""What a store's manifest says of a source's distributions."""

from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fusellm.errors import StoreError
from fusellm.store.identity import Identity
from fusellm.store.manifest import MANIFEST, StageFolder, first_fault
from fusellm.store.quantized import STEP_NATS
from fusellm.store.tables import shard_names


@dataclass(frozen=True)
class Aside:
    """A block without distributions, and why."""

    block: int
    document: str
    reason: str


@dataclass(frozen=True)
class StoreFacts:
    """What a store's manifest says; no shard is read for it.

    Attributes:
        identity: what the store was made from.
        complete: whether the stage has finished; what is there can be read all the same.
        model, revision, architecture: the source, as the recipe names it.
        commit: of a hub model, else None.
        weights_sha256: digest of its weights' files.
        dtype: what it was run in, and how it was quantized, if it was.
        vocabulary: tokens of its tokenizer; ids are below it.
        scheme: "top" or "sampled".
        k, mass: entries kept at a position at most, and until what probability (`top`).
        draws: at a position (`sampled`).
        step_nats: log-probabilities are kept in steps of this.
        error_nats: bound of `|read − written|` of a log-probability.
        blocks, tokens, positions, kept: how many there are; `kept` are entries.
        aside: blocks without distributions.
        shards, bytes: files, and their size.
        device, software, seconds: what wrote it, and how long that took.
        around: of conversations, the chat template that they were read by, and what the model was
            told first where they have no system message; None of plain text.
    """

    identity: Identity
    complete: bool
    model: str
    revision: str | None
    architecture: str
    commit: str | None
    weights_sha256: str
    dtype: str
    vocabulary: int
    scheme: str
    k: int | None
    mass: float | None
    draws: int | None
    step_nats: float
    error_nats: float
    blocks: int
    tokens: int
    positions: int
    kept: int
    aside: tuple[Aside, ...]
    shards: int
    bytes: int
    device: str
    software: dict[str, str]
    seconds: float
    around: tuple[str, str | None] | None = None


class _Kept(TypedDict):
    """What is kept of each distribution."""

    scheme: Literal["top", "sampled"]
    k: PositiveInt
    mass: float | None
    draws: PositiveInt


class About(TypedDict):
    """`about` of a source's distributions."""

    model: str
    revision: str | None
    architecture: str
    commit: str | None
    weights_sha256: str
    dtype: str
    vocabulary: PositiveInt
    externalize: _Kept
    step_nats: float
    error_nats: float
    device: str
    around: NotRequired[tuple[str, str | None]]


class _Counts(TypedDict):
    """What is counted of a shard of distributions."""

    blocks: NonNegativeInt
    numbers: tuple[NonNegativeInt, NonNegativeInt]
    tokens: NonNegativeInt
    positions: NonNegativeInt
    kept: NonNegativeInt
    aside: list[tuple[int, str, str]]


def about_of(folder: StageFolder) -> About:
    """`about` of a source's distributions.

    Raises:
        StoreError: it is not what the stage writes, or its log-probabilities have another unit.
    """
    about: About = _told(folder, "about", About, folder.about)
    if about["step_nats"] != STEP_NATS:
        raise StoreError(
            f"{folder.path} keeps log-probabilities in steps of {about['step_nats']:g} nats, and "
            f"this fusellm reads steps of {STEP_NATS:g}; make it anew"
        )
    return about


def vocabulary_of(folder: StageFolder) -> int | None:
    """How many tokens the tokenizer of a stage has; None where the manifest does not say so.

    Raises:
        StoreError: the manifest says something else there.
    """
    vocabulary: int | None = _told(
        folder, "about.vocabulary", PositiveInt | None, folder.about.get("vocabulary")
    )
    return vocabulary


def _told(folder: StageFolder, key: str, kind: Any, value: Any) -> Any:
    """A value of a manifest, which has to be of a kind."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise StoreError(
            f"{folder.path / MANIFEST} is not what externalize writes ({key}: "
            f"{first_fault(error)}); do not use it"
        ) from None


def facts_of(folder: StageFolder) -> StoreFacts:
    """What the manifest of a source's distributions says.

    Raises:
        StoreError: it is not what the stage writes.
    """
    told: dict[str, Any] = {**about_of(folder)}
    kept: _Kept = told.pop("externalize")
    rows = [folder.shards[name] for name in shard_names(folder)]
    counts: list[_Counts] = _told(folder, "shards", list[_Counts], [row["counts"] for row in rows])
    sampled = kept["scheme"] == "sampled"
    return StoreFacts(
        **told,
        identity=folder.identity,
        complete=folder.complete,
        scheme=kept["scheme"],
        k=None if sampled else kept["k"],
        mass=None if sampled else kept["mass"],
        draws=kept["draws"] if sampled else None,
        blocks=sum(row["blocks"] for row in counts),
        tokens=sum(row["tokens"] for row in counts),
        positions=sum(row["positions"] for row in counts),
        kept=sum(row["kept"] for row in counts),
        aside=tuple(Aside(*entry) for row in counts for entry in row["aside"]),
        shards=len(rows),
        bytes=sum(row["bytes"] for row in rows),
        software=folder.software,
        seconds=folder.seconds,
    )
