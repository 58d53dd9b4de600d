"""The files of an entry of the corpus: found by pattern, in order, each once."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusellm.config import FileDocuments
from fusellm.errors import CorpusError

# What the system shows as files there is no text of anybody's: its state, other programs' memory.
_OF_THE_SYSTEM = ("/proc", "/sys")


def files_of(entry: FileDocuments) -> list[Path]:
    """The files of an entry, in order.

    Raises:
        CorpusError: a pattern fits no file, or something that is none; a folder cannot be read.
    """
    patterns = [entry.files] if isinstance(entry.files, str) else entry.files
    by_real_path: dict[str, Path] = {}
    for pattern in patterns:
        files = [path for path in _fitting(pattern) if _is_file(path)]
        if not files:
            hint = "check the path, which is relative to the recipe's folder"
            if Path(pattern).expanduser().is_dir():
                hint = f"it is a folder; {pattern.rstrip('/')}/**/* stands for all files in it"
            raise CorpusError(f"corpus.documents: no file fits {pattern!r}; {hint}")
        for path in files:
            by_real_path.setdefault(os.path.realpath(path), path)
    return list(by_real_path.values())


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Paths below their common folder: names that do not change when the folder is moved.

    >>> relative_names([Path("/data/a/x.txt"), Path("/data/b/x.txt")])
    ['a/x.txt', 'b/x.txt']
    """
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).as_posix() for path in paths]


def _fitting(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    try:
        return sorted(set(_matches(Path(path.anchor), path.relative_to(path.anchor).parts)))
    except OSError as error:
        raise CorpusError(
            f"corpus.documents: {error.filename} cannot be read ({error.strerror}); mend that, or "
            f"leave it out of {pattern!r}"
        ) from error
    except ValueError:
        raise CorpusError(
            f"corpus.documents: {pattern!r}: ** is any folders and stands alone between slashes, "
            "as in data/**/*.jsonl"
        ) from None


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What fits a pattern below a folder; `**` leads through links to folders too."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    if first == "**":
        rest = rest or ["*"]
        steps = _folders(folder) if folder.is_dir() else iter(())
    elif os.path.lexists(folder / first):  # as it is written, [brackets] and all
        steps = iter([folder / first])
    else:
        steps = folder.glob(first)
    for step in steps:
        yield from _matches(step, rest)


def _folders(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A folder and those below it, but none inside itself, where a link leads back."""
    place = os.path.realpath(folder)
    if place in above:
        return
    yield folder
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir())
    for name in inner:
        yield from _folders(folder / name, above | {place})


def _is_file(path: Path) -> bool:
    """Whether a match is a file; folders are passed over, what is neither is refused."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CorpusError(
            f"corpus.documents: {path} cannot be read ({error.strerror}); where it is a link, "
            "fetch what it leads to, or leave it out of files"
        ) from error
    if stat.S_ISDIR(mode):
        return False
    real = os.path.realpath(path)
    if not stat.S_ISREG(mode) or real.startswith(tuple(f"{top}/" for top in _OF_THE_SYSTEM)):
        raise CorpusError(
            f"corpus.documents: {path} is no ordinary file but a pipe, a device or the system's; "
            "copy what it holds into a file, or leave it out of files"
        )
    return True
