"""Files that are there whole or not at all."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fusellm.errors import StoreError


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        StoreError: it cannot be written, the disk being full or for another reason.
    """
    temporary = path.with_name(path.name + ".writing")
    with writing_explained(path):
        try:
            with temporary.open("wb") as file:
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: {path} could not be written. {kept} free some space"
        else:
            message = f"{path} could not be written: {error.strerror or error}. {kept} mend that"
        raise StoreError(f"{message} and run the same command again") from error


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
