"""Digests of corpus files, which are read again only when one of them has changed."""

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fusellm.config import FileDocuments
from fusellm.corpus.formats import FileKind, kind_of
from fusellm.corpus.paths import files_of, relative_names
from fusellm.errors import CorpusError, StoreError
from fusellm.progress import Bar, Progress, Silent
from fusellm.store.files import make_folder, write_text
from fusellm.store.identity import digest
from fusellm.store.translations import cache_folder

# From this size on, digests are kept and making them shows a bar: it takes some tenths of a second.
_LARGE_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20
# A file that changed this shortly before it was read may change again and keep its time.
_SETTLED_NS = 2_000_000_000


def digest_of_files(entry: FileDocuments, progress: Progress) -> str:
    """Digest of what an entry's files are called, what they hold, and how they are read.

    Those of many bytes are kept in the user's cache folder, under the files' sizes and times.

    Raises:
        CorpusError: a file is missing, cannot be read, or is of no known kind.
    """
    paths = files_of(entry)
    kinds = [kind_of(path, entry.format) for path in paths]
    try:
        facts = [path.stat() for path in paths]
        size = sum(fact.st_size for fact in facts)
        if size < _LARGE_BYTES:
            return _digest(paths, kinds, size, Silent())
        known = [
            [str(path), kind, fact.st_ino, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns]
            for path, kind, fact in zip(paths, kinds, facts, strict=True)
        ]
        place = cache_folder() / "corpora" / f"{digest(known)}.txt"
        files_digest = _kept(place)
        if files_digest is None:
            began = time.time_ns()
            files_digest = _digest(paths, kinds, size, progress)
            if began - max(fact.st_ctime_ns for fact in facts) > _SETTLED_NS:
                _keep(place, files_digest)
        return files_digest
    except OSError as error:
        raise CorpusError(
            f"corpus.documents: {error.filename} cannot be read ({error.strerror}); mend that, or "
            "leave it out of files"
        ) from error


def _digest(paths: Sequence[Path], kinds: Sequence[FileKind], size: int, progress: Progress) -> str:
    names = relative_names(paths)
    with progress.start("reading what files hold", size, "bytes") as bar:
        return digest(
            [
                [name, _sha256(path, bar), *_as_once(path, kind)]
                for name, path, kind in zip(names, paths, kinds, strict=True)
            ]
        )


def _as_once(path: Path, kind: FileKind) -> list[str]:
    """A file's kind, but nothing for those that were always read so: their digests stay."""
    once = path.suffix.removeprefix(".") if path.suffix in (".parquet", ".jsonl") else "text"
    return [] if str(kind) == once else [str(kind)]


def _sha256(path: Path, bar: Bar) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            bar.advance(len(chunk))
    return sha256.hexdigest()


def _kept(place: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        text = place.read_text(encoding="utf-8")
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
    return None


def _keep(place: Path, files_digest: str) -> None:
    with suppress(StoreError):  # a folder that cannot be written to is passed over
        make_folder(place.parent)
        write_text(place, files_digest)
