"""A stage's folder for writing: by one process, each file whole or not at all, resumable."""

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fusellm.errors import StoreError
from fusellm.store.files import (
    file_digest,
    make_folder,
    require_inside,
    require_no_links,
    sync_files,
    write_whole,
    writing_explained,
)
from fusellm.store.identity import Identity
from fusellm.store.manifest import (
    MANIFEST,
    Manifest,
    Segment,
    StageFolder,
    check_identity,
    segments_of,
)
from fusellm.store.run_folder import ASIDE

_LOCK = ".lock"
# What flock says where there are no locks: NFS without its service, Lustre without -o flock.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_SOFTWARE = ("fusellm", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


class StageWriter(StageFolder):
    """A stage's folder opened for writing, by one process at a time."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, identity: Identity, resume: bool = True) -> Iterator["StageWriter"]:
        """Begin a stage, or go on with it.

        A finished folder on a disk that cannot be written to is opened as it is.

        Args:
            resume: whether to go on with a folder that is not finished, or to begin it anew
                whatever it was made from.

        Raises:
            IdentityError: the folder was made from something else.
            StoreError: another process is writing in it, it is damaged, or a link leads from it to
                elsewhere.
        """
        finished = (path / MANIFEST).exists() and StageFolder(path).complete
        if finished and not os.access(path, os.W_OK):
            check_identity(path, identity)
            yield cls(path)
            return
        require_inside(path, path.absolute().parents[identity.stage.count("/")])
        if not finished:
            require_no_links(path)
        make_folder(path)
        with _locked(path):
            if (path / MANIFEST).exists() and not resume:
                writer = cls(path)
                if not writer.complete:
                    writer.forget(list(writer.shards))
                    (path / MANIFEST).unlink()
            if (path / MANIFEST).exists():
                check_identity(path, identity)
            else:
                _save(path, Manifest(identity, software_versions()))
            writer = cls(path)
            writer._began = time.monotonic()
            for leftover in path.glob("*.writing"):
                leftover.unlink()
            if not writer.complete:
                writer.forget([name for name in writer.shards if not writer._has_its_size(name)])
            yield writer

    _began: float = 0.0

    def _has_its_size(self, name: str) -> bool:
        try:
            self.sized_file(name)
        except StoreError:
            return False
        return True

    def write(
        self,
        name: str,
        data: bytes,
        counts: Mapping[str, Any] | None = None,
        segments: Sequence[Segment] | None = None,
    ) -> None:
        """Write one shard so that it is there whole or not at all.

        Args:
            segments: runs of its bytes that are verified one by one; by default it is one.

        Raises:
            StoreError: it cannot be written.
        """
        path = self.path / name
        write_whole(path, lambda file: file.write(data))
        self._manifest.shards[name] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "segments": [list(segment) for segment in segments or segments_of(data)],
            "counts": dict(counts or {}),
        }
        self._save()

    def write_text(self, name: str, text: str) -> None:
        """Write one text file as a shard."""
        self.write(name, text.encode())

    def adopt_all(self) -> None:
        """Count the files that a library wrote into the folder as finished shards."""
        sync_files(self.path)
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.name not in (MANIFEST, _LOCK):
                self._manifest.shards[path.name] = {
                    "sha256": file_digest(path),
                    "bytes": path.stat().st_size,
                    "segments": [],
                    "counts": {},
                }
        self._save()

    def forget(self, names: Sequence[str]) -> None:
        """Take shards out of the manifest and off the disk, so that they are made anew."""
        if not names:
            return
        for name in names:
            self._manifest.shards.pop(name, None)
        self._manifest.complete = False
        self._save()
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Say what is in the folder, for who reads it without its recipe."""
        self._manifest.about = dict(about)
        self._save()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Mark the stage as complete."""
        self._manifest.counts = dict(counts)
        self._manifest.complete = True
        # Their order is that of their names, whatever order they were finished in.
        self._manifest.shards = dict(sorted(self._manifest.shards.items()))
        self._save()

    def _save(self) -> None:
        now = time.monotonic()
        self._manifest.seconds += now - self._began
        self._began = now
        _save(self.path, self._manifest)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep every other process from writing in a folder.

    On a file system without locks nothing keeps them from it.

    Raises:
        StoreError: another one does.
    """
    path = folder / _LOCK
    while True:
        with writing_explained(path):
            # A link in its place is not followed, and nothing is emptied.
            lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            take_lock(lock, folder)
            # The one before may have removed the file between our opening and locking it.
            if _is_at(lock, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def take_lock(descriptor: int, folder: Path) -> None:
    """Lock an open file or folder, so that one process alone writes in `folder`.

    On a file system without locks nothing keeps others from it.

    Raises:
        StoreError: another process has it, or it could not be locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(
            f"another process is writing in {folder}; wait for it or stop it"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise StoreError(
                f"{folder} could not be locked: {error.strerror}; mend that and run the same "
                "command again"
            ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _save(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST, lambda file: file.write(manifest.to_bytes()))


def software_versions() -> dict[str, str]:
    """Versions of what a stage's result may depend on."""
    versions = {"python": platform.python_version()}
    for package in _SOFTWARE:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def set_aside(run: Path, folders: list[Path]) -> Path | None:
    """Move folders of a run into `run/aside/<n>/`. Returns that folder, or None if none exists."""
    existing = [folder for folder in folders if folder.exists()]
    if not existing:
        return None
    parent = run / ASIDE
    require_inside(parent, run)
    parent.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    for folder in existing:
        place = parent / str(number) / folder.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, place)
    return parent / str(number)
