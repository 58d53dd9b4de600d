"""Text that every installation already has: the built-in corpus.

Three domains, read from the standard library and from the installed torch, transformers and numpy:

    prose    docstrings, one document each
    python   code with its docstrings taken out, one document a file
    cpp      the C++ headers that torch ships, one document a file

Documents are told apart by (distribution, path without version, qualified name), whose hash sends
each to one of four parts. The same document therefore lands in the same part whatever version of
torch or transformers is installed, and what the zoo was trained on stays apart from what a run
trains and measures on.
"""

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusellm.errors import CorpusError

RULES = 2
"""Of what is a document and what is left out: counts in the identity of a corpus."""

DOMAINS = ("prose", "python", "cpp")
PARTS = ("zoo", "train", "validation", "held_out")

# Upper ends of each part's share of the hash's range, in percent.
_PART_ENDS_PERCENT = {"held_out": 10, "validation": 15, "train": 35, "zoo": 100}
_PACKAGES = ("numpy", "torch", "transformers")
# Tests are no sample of a language's use, and transformers/models repeats itself model by model.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "models", "lib2to3"})
_MIN_PROSE_BYTES = 200
_CODE_BYTES = (200, 200_000)  # larger files are tables and amalgamations, made by programs
_SHINGLE_WORDS = 8
_NEAR_DUPLICATE_SHARE = 0.5
_BASE = np.uint32(0x9E3779B1)  # odd, so that multiplying loses nothing
_WORD = re.compile(r"\w+")
_NONE = np.empty(0, np.uint32)
_LINE = re.compile(r"[^\n\r]*(?:\r\n|\n|\r|$)")


@dataclass(frozen=True)
class Document:
    """One document of the built-in corpus.

    `name` is `distribution/path` and, for a docstring, `:qualified.name`.
    """

    name: str
    domain: str
    part: str
    text: str


def part_of(name: str) -> str:
    """The part that a document's name belongs to.

    >>> part_of("torch/nn/modules/linear.py:Linear")
    'zoo'
    """
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10_000 / 100
    for part, end in _PART_ENDS_PERCENT.items():
        if percent < end:
            return part
    raise AssertionError("the last part ends at 100 percent")


def documents(
    parts: Iterable[str],
    domains: Iterable[str] = DOMAINS,
    on_file: Callable[[], None] | None = None,
) -> Iterator[Document]:
    """Read all documents of the given parts and domains, in the order of their paths.

    `on_file` is called once a file, for a progress bar over `count_files(domains)`.

    Raises:
        CorpusError: none of the packages is installed.
    """
    wanted, domains = frozenset(parts), frozenset(domains)
    for distribution, root, path in _python_files() if domains & {"prose", "python"} else []:
        if on_file is not None:
            on_file()
        of_file = _of_python_file(distribution, root, path, wanted, domains)
        yield from (document for document in of_file if document.domain in domains)
    for root, path in _header_files() if "cpp" in domains else []:
        if on_file is not None:
            on_file()
        name = f"torch/include/{path.relative_to(root).as_posix()}"
        if part_of(name) in wanted:
            text = path.read_text(encoding="utf-8", errors="replace")
            if _is_code(text):
                yield Document(name, "cpp", part_of(name), text)


def count_files(domains: Iterable[str] = DOMAINS) -> int:
    """How many files `documents` reads."""
    domains = frozenset(domains)
    python = len(_python_files()) if domains & {"prose", "python"} else 0
    return python + (len(_header_files()) if "cpp" in domains else 0)


def drop_near_duplicates(
    kept_apart: Iterable[Document], training: Sequence[Document]
) -> tuple[list[Document], int]:
    """Leave out training documents half of whose word 8-grams stand in a document kept apart.

    Returns the documents left and how many were dropped.

    >>> text = " ".join(f"word{i}" for i in range(100))
    >>> held_out = [Document("a", "prose", "held_out", text)]
    >>> drop_near_duplicates(held_out, [Document("b", "prose", "train", "See: " + text)])
    ([], 1)
    """
    hash_of = _WordHashes()
    apart = (_shingles(one.text, hash_of) for one in kept_apart)
    seen = _distinct(np.concatenate([_NONE, *apart]))
    left = []
    for document in training:
        shingles = _shingles(document.text, hash_of)
        place = np.minimum(np.searchsorted(seen, shingles), max(len(seen) - 1, 0))
        met = (seen[place] == shingles).sum() if len(seen) else 0
        if not len(shingles) or met < _NEAR_DUPLICATE_SHARE * len(shingles):
            left.append(document)
    return left, len(training) - len(left)


def _is_code(text: str) -> bool:
    least, most = _CODE_BYTES
    return least <= len(text.encode()) <= most


class _WordHashes(dict[str, int]):
    """Hashes of words, each made once: a text has few different ones."""

    def __missing__(self, word: str) -> int:
        crc = self[word] = zlib.crc32(word.encode())
        return crc


def _shingles(text: str, hash_of: _WordHashes) -> np.ndarray:
    """Hashes of the different word 8-grams of a text, ascending; of a shorter text, of it all."""
    words = _WORD.findall(text)
    hashes = np.fromiter(map(hash_of.__getitem__, words), np.uint32, len(words))
    count = max(len(words) - _SHINGLE_WORDS + 1, 1 if words else 0)
    grams = np.zeros(count, np.uint32)
    for n in range(min(_SHINGLE_WORDS, len(words))):  # a number in base _BASE, modulo 2**32
        grams = grams * _BASE + hashes[n : n + count]
    return _distinct(grams)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The different ones, ascending; numpy's own `unique` takes ten times as long for millions."""
    ordered = np.sort(values)
    is_new = np.ones(len(ordered), dtype=np.bool_)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_new]


def _package_root(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _python_files() -> list[tuple[str, Path, Path]]:
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in _PACKAGES:
        root = _package_root(package)
        if root is not None:
            roots.append((package, root))
    if len(roots) == 1:
        raise CorpusError(
            "the built-in corpus reads the installed torch, transformers and numpy, and none of "
            "them is installed; install fusellm with its dependencies, or name a corpus of your own"
        )
    files = []
    for distribution, root in roots:
        for path in sorted(root.rglob("*.py")):
            folders = path.relative_to(root).parts[:-1]
            if not _SKIPPED_FOLDERS.intersection(folders):
                files.append((distribution, root, path))
    return files


def _header_files() -> list[tuple[Path, Path]]:
    torch_root = _package_root("torch")
    if torch_root is None:
        return []
    root = torch_root / "include"
    return [(root, path) for path in sorted(root.rglob("*.h*")) if path.is_file()]


def _of_python_file(
    distribution: str, root: Path, path: Path, wanted: frozenset[str], domains: frozenset[str]
) -> Iterator[Document]:
    file_name = f"{distribution}/{path.relative_to(root).as_posix()}"
    if "prose" not in domains and part_of(file_name) not in wanted:
        return
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        text = source.decode("utf-8")
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # a template or a sample of bad code; there are a few
    owners = list(_docstring_owners(tree, ""))
    for qualified_name, node in owners:
        name = f"{file_name}:{qualified_name}"
        if part_of(name) in wanted:
            prose = inspect.cleandoc(_docstring_of(node))
            if len(prose) >= _MIN_PROSE_BYTES:
                yield Document(name, "prose", part_of(name), prose + "\n")
    if part_of(file_name) in wanted:
        code = _without_docstrings(text, [node for _, node in owners])
        if _is_code(code):
            yield Document(file_name, "python", part_of(file_name), code)


_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstring_owners(node: ast.AST, qualified_name: str) -> Iterator[tuple[str, _Owner]]:
    if isinstance(node, _Owner) and ast.get_docstring(node, clean=False) is not None:
        yield qualified_name, node
    for child in ast.iter_child_nodes(node):  # a definition may stand under an `if` or a `try`
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        name = qualified_name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{qualified_name}.{child.name}" if qualified_name else child.name
        yield from _docstring_owners(child, name)


def _docstring_of(node: _Owner) -> str:
    docstring = ast.get_docstring(node, clean=False)
    assert docstring is not None
    return docstring


def _without_docstrings(text: str, owners: Sequence[_Owner]) -> str:
    lines = _LINE.findall(text)  # splitlines() would also cut at form feeds, where ast does not
    for node in owners:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        first, last = docstring.lineno - 1, docstring.end_lineno
        before = lines[first].encode()[: docstring.col_offset].decode()
        after = lines[last - 1].encode()[docstring.end_col_offset :].decode()
        if before.strip() or after.lstrip().startswith(";"):  # it shares its line with code
            left = f"{before}...{after}"
        else:
            left = f"{before}...\n" if len(node.body) == 1 else ""
        lines[first:last] = [left] + [""] * (last - first - 1)
    return "".join(lines)
