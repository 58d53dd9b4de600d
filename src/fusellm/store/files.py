"""Files that are there whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from fusellm.errors import StoreError

_LITTLE_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_json(text: str) -> Any:
    """What a text is in JSON.

    Raises:
        ValueError: it is none, or nested deeper than Python reads, as no one writes it who means
            well.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all.

    One that has this text stays as it is, so that a finished run can be read-only.

    Raises:
        StoreError: it cannot be written.
    """
    data = text.encode()
    if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
        write_whole(path, lambda file: file.write(data))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all.

    A link that stands in its place is replaced, and what it leads to stays as it is.

    Raises:
        StoreError: it cannot be written, the disk being full or for another reason.
    """
    temporary = path.with_name(path.name + ".writing")
    with writing_explained(path):
        try:
            temporary.unlink(missing_ok=True)  # what a kill left, or somebody's link
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, unless it is there.

    Raises:
        StoreError: it cannot be made.
    """
    with writing_explained(path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(folder: Path) -> None:
    """Check that a folder, which need not be there yet, can be written to, by writing to it.

    What would hold it is written to where it is not there. Nothing is left behind.

    Raises:
        StoreError: it cannot.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise StoreError(f"{folder} can be no folder: {place} is a file; give another place")
    try:
        _try_to_write(place, 1)
    except OSError as error:
        if error.errno in _FULL:
            message = f"the disk is full: {place} cannot be written to; free some space"
        else:
            message = f"{place} cannot be written to: {error.strerror or error}; mend that"
        raise StoreError(f"{message}, or give another place") from error


def require_inside(path: Path, run: Path) -> None:
    """Check that no link leads out of a run to where something would be written or removed.

    Args:
        path: a folder of the run, which need not be there yet.

    Raises:
        StoreError: one does.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise StoreError(
            f"{path} is a link out of {run}, to {path.resolve()}, and would be written to; remove "
            "the link, or put a copy of what it leads to in its place"
        )


def require_no_links(folder: Path) -> None:
    """Check that there are no links where libraries write, which follow them.

    Raises:
        StoreError: there is one, in the folder or below it.
    """
    for place, names, files in os.walk(folder):
        for path in (Path(place, name) for name in (*names, *files)):
            if path.is_symlink():
                raise StoreError(
                    f"{path} is a link, to {path.readlink()}, in a folder that is written to; "
                    "remove it, or put a copy of what it leads to in its place"
                )


@contextmanager
def writing_explained(path: Path) -> Iterator[None]:
    """Say which path could not be written and why, in place of the system's error.

    Raises:
        StoreError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        kept = "Finished shards are kept;"
        if error.errno in _FULL:
            message = f"the disk is full: {path} could not be written. {kept} free some space"
        else:
            message = f"{path} could not be written: {error.strerror or error}. {kept} mend that"
        raise StoreError(f"{message} and run the same command again") from error


@contextmanager
def saving_explained(folder: Path) -> Iterator[None]:
    """`writing_explained` for libraries that do not hand on the system's error.

    torch says "unexpected pos 64 vs 0" where the disk is full.

    Args:
        folder: that something is saved in; it exists.

    Raises:
        StoreError: the library's error is that it could not write.
    """
    with writing_explained(folder):
        try:
            yield
        except SafetensorError as error:
            _try_to_write(folder)
            raise OSError(str(error)) from error
        except RuntimeError:
            _try_to_write(folder)
            raise


def _try_to_write(folder: Path, size: int = _LITTLE_BYTES) -> None:
    """Write a little, for the system's own error where nothing can be written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this section for the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Have the files under a folder that a library wrote on disk before going on."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_files(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Have a folder's names on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
