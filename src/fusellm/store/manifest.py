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
from typing import Any, NamedTuple

from fusellm.errors import IdentityError, StoreError
from fusellm.store.files import file_digest
from fusellm.store.identity import Identity, digest

FORMAT = 1
MANIFEST = "manifest.json"
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


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.json.

    Raises:
        StoreError: any byte of it differs from what was written, or its format is newer.
    """
    raw = path.read_bytes()
    end = len(_CHECKSUM.format("0" * 64))
    body = raw[:-end]
    if raw[-end:] != _CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode():
        _refuse_other_formats(path, raw)
        raise StoreError(
            f"{path} is damaged (its checksum does not fit); move {path.parent} away and run the "
            "stage again"
        )
    _refuse_other_formats(path, raw)
    found = json.loads(raw)
    names = found["shards"]
    outside = next((n for n in names if Path(n).name != n or n in ("", "..")), None)
    if outside is not None:  # it would be read, and removed by a repair
        raise StoreError(f"{path} names a file outside of its folder, {outside!r}; do not use it")
    return Manifest(
        Identity(found["stage"], found["settings"], found["inputs"]),
        found["software"],
        found["about"],
        found["shards"],
        found["counts"],
        found["seconds"],
        found["complete"],
    )


def _refuse_other_formats(path: Path, raw: bytes) -> None:
    """Say so where the manifest is of another version, whose checksum may be another one too."""
    try:
        found = json.loads(raw)
        version = found["format"]
    except (ValueError, KeyError, TypeError):
        return
    if not isinstance(version, int) or version == FORMAT:
        return
    software = found.get("software")
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
        if not path.exists():
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
