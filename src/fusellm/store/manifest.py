"""A stage's folder for reading: its manifest, which is the only truth about it.

A shard counts as finished when the manifest says so, and the manifest says so after the shard has
been synced to disk under its final name.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Required

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    StrictInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict  # pydantic wants these before Python 3.12

from fusellm.errors import IdentityError, StoreError
from fusellm.store.files import file_digest
from fusellm.store.identity import Identity, digest

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_SUFFIX = ".arrow"
_CHECKSUM = ',\n"checksum": "{}"\n}}\n'


class Segment(NamedTuple):
    """A run of bytes of a file that is verified as one: a record batch, or what frames them."""

    length: int
    crc32: int


@dataclass
class Manifest:
    """What a manifest.json says; docs/store-format.md explains each key."""

    identity: Identity
    software: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = False

    def to_bytes(self) -> bytes:
        """The file: a line a key, a line a shard, and a checksum over all bytes before it."""
        head = {
            "format": FORMAT,
            "stage": self.identity.stage,
            "settings": self.identity.settings,
            "inputs": self.identity.inputs,
            "about": self.about,
            "software": self.software,
            "counts": self.counts,
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
        }
        lines = [f"{_json(key)}: {_json(value)}" for key, value in head.items()]
        shards = ",\n".join(f" {_json(name)}: {_json(s)}" for name, s in self.shards.items())
        lines.append('"shards": {\n' + shards + "\n}" if shards else '"shards": {}')
        body = ("{\n" + ",\n".join(lines)).encode()
        return body + _CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@with_config(ConfigDict(extra="allow"))
class _Counts(TypedDict, total=False):
    """What is counted of a shard, as far as readers rely on it; a stage counts more."""

    blocks: NonNegativeInt
    numbers: tuple[NonNegativeInt, NonNegativeInt]


class _Shard(TypedDict):
    """The record of a shard."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: NonNegativeInt
    segments: list[tuple[NonNegativeInt, NonNegativeInt]]
    counts: _Counts


class _Version(TypedDict, total=False):
    """What a manifest of any format says of itself."""

    format: Required[StrictInt]
    software: Any


class _File(TypedDict):
    """What a manifest.json of this format holds."""

    stage: str
    settings: dict[str, JsonValue]
    inputs: dict[str, str]
    software: dict[str, str]
    about: dict[str, JsonValue]
    shards: dict[str, _Shard]
    counts: dict[str, JsonValue]
    seconds: float
    complete: bool


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.json.

    Raises:
        StoreError: any byte of it differs from what was written, its format is newer, or it holds
            what no stage writes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}; check its rights and the disk"
        ) from error
    end = len(_CHECKSUM.format("0" * 64))
    body = raw[:-end]
    if raw[-end:] != _CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode():
        _refuse_other_formats(path, raw)
        raise StoreError(
            f"{path} is damaged (its checksum does not fit); move {path.parent} away and run the "
            "stage again"
        )
    _refuse_other_formats(path, raw)
    try:
        content = TypeAdapter(_File).validate_json(raw, strict=True)
    except ValidationError as error:
        raise _unlike_a_manifest(path, error) from None
    for name, shard in content["shards"].items():
        _check_shard(path, name, shard)
    return Manifest(
        Identity(content["stage"], content["settings"], content["inputs"]),
        content["software"],
        dict(content["about"]),
        {name: dict(shard) for name, shard in content["shards"].items()},
        dict(content["counts"]),
        content["seconds"],
        content["complete"],
    )


def _check_shard(path: Path, name: str, shard: _Shard) -> None:
    """Refuse a shard that is no file of the folder, or whose checksums are not of all its bytes."""
    # It would be read, and removed by a repair.
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise StoreError(f"{path} names a file outside of its folder, {name!r}; do not use it")
    if name.endswith(SHARD_SUFFIX) and "blocks" not in shard["counts"]:
        raise StoreError(f"{path} does not say how many blocks {name} has; do not use it")
    lengths = [length for length, _ in shard["segments"]]
    if lengths and sum(lengths) != shard["bytes"]:
        raise StoreError(
            f"{path} cannot be right: the segments of {name} have {sum(lengths):,} bytes, and the "
            f"file has {shard['bytes']:,}; do not use it"
        )


def _unlike_a_manifest(path: Path, error: ValidationError) -> StoreError:
    return StoreError(
        f"{path} is not what a stage writes ({first_fault(error)}), although its checksum fits; "
        f"move {path.parent} away and run the stage again"
    )


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, after the keys that lead to it."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])


def _refuse_other_formats(path: Path, raw: bytes) -> None:
    """Say so where the manifest is of another version, whose checksum may be another one too."""
    try:
        content = TypeAdapter(_Version).validate_json(raw)
    except ValidationError:
        return
    version, software = content["format"], content.get("software")
    if version == FORMAT:
        return
    writer = software.get("fusellm", "unknown") if isinstance(software, dict) else "unknown"
    cure = "install a newer fusellm" if version > FORMAT else "move it away and make it anew"
    raise StoreError(
        f"{path} has format {version}, written by fusellm {writer}, and this fusellm reads format "
        f"{FORMAT}; {cure}"
    )


class StageFolder:
    """A stage's folder opened for reading."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            StoreError: there is none, or its manifest is damaged or of another format.
        """
        self.path = path
        if not (path / MANIFEST).exists():
            raise StoreError(f"{path} has no {MANIFEST}: the stage that writes it has not begun")
        self._manifest = read_manifest(path / MANIFEST)

    @property
    def identity(self) -> Identity:
        """What the folder was made from."""
        return self._manifest.identity

    @property
    def software(self) -> dict[str, str]:
        """Versions of what wrote it."""
        return self._manifest.software

    @property
    def about(self) -> dict[str, Any]:
        """What is in it, for who reads it without its recipe."""
        return self._manifest.about

    @property
    def complete(self) -> bool:
        """Whether the stage has finished."""
        return self._manifest.complete

    @property
    def counts(self) -> dict[str, Any]:
        """What the stage counted."""
        return self._manifest.counts

    @property
    def seconds(self) -> float:
        """Time spent in the stage, over all its runs."""
        return self._manifest.seconds

    @property
    def shards(self) -> dict[str, dict[str, Any]]:
        """Finished shards: name to checksums, bytes and counts."""
        return self._manifest.shards

    @property
    def fingerprint(self) -> str:
        """Digest of the folder's content, the same for the same shards."""
        sums = {name: shard["sha256"] for name, shard in sorted(self.shards.items())}
        return digest({"stage": self.identity.stage, "shards": sums})

    def require_complete(self, command: str) -> "StageFolder":
        """The folder itself.

        Raises:
            StoreError: the stage has not finished; `command` finishes it.
        """
        if not self.complete:
            raise StoreError(f"{self.path} is unfinished; `{command}` goes on with it")
        return self

    def file(self, name: str) -> Path:
        """Path of a finished shard, after its checksum has been verified.

        Raises:
            StoreError: it is not finished, is missing, or differs from what was written.
        """
        path = self.sized_file(name)
        if file_digest(path) != self.shards[name]["sha256"]:
            raise self.damaged(name, "its checksum differs")
        return path

    def sized_file(self, name: str) -> Path:
        """Path of a finished shard that has its size; its content is not verified.

        Raises:
            StoreError: it is not finished, is missing, or is shorter or longer.
        """
        path = self.path / name
        if name not in self.shards:
            raise StoreError(f"{path} is not among the finished shards of {self.path}")
        if not path.is_file():
            raise StoreError(f"{path} is missing; {_redo_hint(self.path)}")
        size, written = path.stat().st_size, self.shards[name]["bytes"]
        if size != written:
            raise self.damaged(name, f"it has {size} bytes, and {written} were written")
        return path

    def segments(self, name: str) -> list[Segment]:
        """The runs of bytes of a finished shard, each with its checksum."""
        return [Segment(*entry) for entry in self.shards[name]["segments"]]

    def damaged(self, name: str, how: str) -> StoreError:
        """The error that says so of a shard."""
        return StoreError(f"{self.path / name} is damaged ({how}); {_redo_hint(self.path)}")


def segments_of(data: bytes, cuts: Sequence[int] = ()) -> list[Segment]:
    """Checksums of the runs of bytes between cuts, which are offsets into the data.

    >>> [segment.length for segment in segments_of(b"abcdef", [2, 3])]
    [2, 1, 3]
    """
    ends = [*cuts, len(data)]
    view = memoryview(data)
    return [
        Segment(end - start, zlib.crc32(view[start:end]))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _redo_hint(path: Path) -> str:
    return (
        f"`fusellm store verify {path} --repair` drops what is damaged, and the same command as "
        "before makes it anew"
    )


def check_identity(path: Path, identity: Identity) -> None:
    """Check that an existing folder, if there is one, was made from this identity.

    Raises:
        IdentityError: it was not; the message names the stage and what differs.
    """
    if not (path / MANIFEST).exists():
        return
    differences = identity.differences(read_manifest(path / MANIFEST).identity)
    if differences:
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences)}. Give another --out, "
            f"or add --redo to move {identity.stage} and what follows aside and make them anew"
        )
