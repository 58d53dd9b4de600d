"""A stage's folder: its identity, its finished shards, and going on after an interruption.

The manifest is the only truth about a folder. A shard counts as finished when the manifest says
so, and the manifest says so after the shard has been synced to disk under its final name.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from fusellm.errors import IdentityError, StoreError
from fusellm.store.files import file_digest, sync_files, sync_folder, write_text

FORMAT = 0
MANIFEST = "manifest.json"
_LOCK = ".lock"
_SOFTWARE = ("fusellm", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What a stage's folder was made from. Two runs of equal identity give equal folders.

    Attributes:
        stage: name of the stage, with the source's where it has one.
        settings: the recipe's keys that the stage reads.
        inputs: fingerprints of everything that it read: weights, tokenizers, earlier stages.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    def differences(self, other: "Identity") -> list[str]:
        """What differs, each as `key: other's value here, own value there`."""
        found = []
        for kind, mine, theirs in (
            ("", _flat(self.settings), _flat(other.settings)),
            ("input ", self.inputs, other.inputs),
        ):
            for key in sorted(mine.keys() | theirs.keys()):
                if mine.get(key) != theirs.get(key):
                    had, wanted = _short(theirs.get(key)), _short(mine.get(key))
                    found.append(f"{kind}{key} was {had} and is now {wanted}")
        return found


def _flat(value: Any, before: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys, as --set names them."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return {before: value}
    flat: dict[str, Any] = {}
    for key, inner in pairs:
        flat |= _flat(inner, f"{before}.{key}" if before else str(key))
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64:
        return value[:12] + "…"
    return text if len(text) <= 80 else text[:77] + "…"


@dataclass
class _Manifest:
    identity: Identity
    software: dict[str, str]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = False

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "stage": self.identity.stage,
            "settings": self.identity.settings,
            "inputs": self.identity.inputs,
            "software": self.software,
            "shards": self.shards,
            "counts": self.counts,
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
        }
        return json.dumps(body | {"checksum": digest(body)}, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path) -> _Manifest:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        intact = checksum == digest(body)
    except (ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise StoreError(
            f"{path} is damaged (its checksum does not fit); move {path.parent} away and run the "
            "stage again"
        )
    if body["format"] > FORMAT:
        raise StoreError(
            f"{path} has format {body['format']}, and this fusellm reads up to {FORMAT}; install a "
            "newer fusellm"
        )
    return _Manifest(
        Identity(body["stage"], body["settings"], body["inputs"]),
        body["software"],
        body["shards"],
        body["counts"],
        body["seconds"],
        body["complete"],
    )


class StageFolder:
    """A stage's folder opened for reading."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            StoreError: there is none, or its manifest is damaged or of a newer format.
        """
        self.path = path
        if not (path / MANIFEST).exists():
            raise StoreError(f"{path} has no {MANIFEST}: the stage that writes it has not begun")
        self._manifest = _read(path / MANIFEST)

    @property
    def identity(self) -> Identity:
        """What the folder was made from."""
        return self._manifest.identity

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
        """Finished shards: name to checksum, bytes and counts."""
        return self._manifest.shards

    @property
    def fingerprint(self) -> str:
        """Digest of the folder's content, the same for the same shards."""
        sums = {name: shard["sha256"] for name, shard in self.shards.items()}
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
        path = self.path / name
        if name not in self.shards:
            raise StoreError(f"{path} is not among the finished shards of {self.path}")
        if not path.exists():
            raise StoreError(f"{path} is missing; {_redo_hint(self.path)}")
        if file_digest(path) != self.shards[name]["sha256"]:
            raise StoreError(f"{path} is damaged (its checksum differs); {_redo_hint(self.path)}")
        return path


def _redo_hint(path: Path) -> str:
    return f"move {path} away and run again to make it anew"


class StageWriter(StageFolder):
    """A stage's folder opened for writing, by one process at a time."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, identity: Identity) -> Iterator["StageWriter"]:
        """Begin a stage, or go on with it.

        Raises:
            IdentityError: the folder was made from something else.
            StoreError: another process is writing in it, or it is damaged.
        """
        path.mkdir(parents=True, exist_ok=True)
        with (path / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreError(
                    f"another process is writing in {path}; wait for it or stop it"
                ) from None
            if (path / MANIFEST).exists():
                check_identity(path, identity)
            else:
                manifest = path / MANIFEST
                with _disk_full_explained(manifest, manifest.with_name(MANIFEST + ".writing")):
                    write_text(manifest, _Manifest(identity, software_versions()).to_json())
            writer = cls(path)
            writer._began = time.monotonic()
            for leftover in path.glob("*.writing"):
                leftover.unlink()
            yield writer
            (path / _LOCK).unlink(missing_ok=True)

    _began: float = 0.0

    def write(
        self, name: str, write: Callable[[BinaryIO], None], counts: Mapping[str, Any] | None = None
    ) -> None:
        """Write one shard so that it is there whole or not at all.

        Raises:
            StoreError: the disk is full.
        """
        path = self.path / name
        temporary = path.with_name(path.name + ".writing")
        with _disk_full_explained(path, temporary):
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            record = {
                "sha256": file_digest(temporary),
                "bytes": temporary.stat().st_size,
                "counts": dict(counts or {}),
            }
            temporary.replace(path)
            sync_folder(self.path)
        self._manifest.shards[name] = record
        self._save()

    def write_text(self, name: str, text: str) -> None:
        """Write one text file as a shard."""

        def write(file: BinaryIO) -> None:
            file.write(text.encode("utf-8"))

        self.write(name, write)

    def adopt_all(self) -> None:
        """Count the files that a library wrote into the folder as finished shards."""
        sync_files(self.path)
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.name not in (MANIFEST, _LOCK):
                self._manifest.shards[path.name] = {
                    "sha256": file_digest(path),
                    "bytes": path.stat().st_size,
                    "counts": {},
                }
        self._save()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Mark the stage as complete."""
        self._manifest.counts = dict(counts)
        self._manifest.complete = True
        self._save()

    def _save(self) -> None:
        now = time.monotonic()
        self._manifest.seconds += now - self._began
        self._began = now
        path = self.path / MANIFEST
        with _disk_full_explained(path, path.with_name(MANIFEST + ".writing")):
            write_text(path, self._manifest.to_json())


def check_identity(path: Path, identity: Identity) -> None:
    """Check that an existing folder, if there is one, was made from this identity.

    Raises:
        IdentityError: it was not; the message names the stage and what differs.
    """
    if not (path / MANIFEST).exists():
        return
    differences = identity.differences(_read(path / MANIFEST).identity)
    if differences:
        raise IdentityError(
            f"{path} was made from something else: {'; '.join(differences)}. Give another --out, "
            f"or add --redo to move {identity.stage} and what follows aside and make them anew"
        )


def software_versions() -> dict[str, str]:
    """Versions of what a stage's result may depend on."""
    found = {"python": platform.python_version()}
    for package in _SOFTWARE:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def set_aside(run: Path, folders: list[Path]) -> Path | None:
    """Move folders of a run into `run/aside/<n>/`. Returns that folder, or None if none exists."""
    existing = [folder for folder in folders if folder.exists()]
    if not existing:
        return None
    parent = run / "aside"
    parent.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    for folder in existing:
        place = parent / str(number) / folder.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, place)
    return parent / str(number)


@contextmanager
def _disk_full_explained(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"the disk is full: {path} could not be written. Finished shards are kept; free some "
            "space and run the same command again"
        ) from error
