"""What a store's manifest says of a source's distributions."""

from dataclasses import dataclass

from fusellm.store.identity import Identity
from fusellm.store.manifest import StageFolder
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
        error_nats: bound of |read − written| of a log-probability.
        blocks, tokens, positions, kept: how many there are; `kept` are entries.
        aside: blocks without distributions.
        shards, bytes: files, and their size.
        device, software, seconds: what wrote it, and how long that took.
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


def facts_of(folder: StageFolder) -> StoreFacts:
    """What the manifest of a source's distributions says."""
    about, kept = folder.about, folder.about["externalize"]
    rows = [folder.shards[name] for name in shard_names(folder)]
    sums = {
        key: sum(row["counts"][key] for row in rows)
        for key in ("blocks", "tokens", "positions", "kept")
    }
    aside = [Aside(*entry) for row in rows for entry in row["counts"]["aside"]]
    sampled = kept["scheme"] == "sampled"
    return StoreFacts(
        identity=folder.identity,
        complete=folder.complete,
        **{key: about[key] for key in ("model", "revision", "architecture", "commit")},
        **{key: about[key] for key in ("weights_sha256", "dtype", "vocabulary", "device")},
        scheme=kept["scheme"],
        k=None if sampled else kept["k"],
        mass=None if sampled else kept["mass"],
        draws=kept["draws"] if sampled else None,
        step_nats=about["step_nats"],
        error_nats=about["error_nats"],
        **sums,
        aside=tuple(aside),
        shards=len(rows),
        bytes=sum(row["bytes"] for row in rows),
        software=folder.software,
        seconds=folder.seconds,
    )
