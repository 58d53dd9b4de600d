"""Held-out text that models of 2024 and 2025 cannot have seen: packages first published in 2026.

    python benchmarks/recent_text.py FOLDER    writes FOLDER/{prose,python,cpp}.jsonl

Reads pinned source archives of Python packages, from the package index that pip is set up with.
Nothing in an archive is installed or run. A line of the output is
`{"text": …, "name": "package-version/path", "package": …}`.

Why 2026: SmolLM2 was released in November 2024 (its paper in February 2025), Qwen2.5-Coder in
November 2024 (its small sizes; 1.5B and 7B in September), Gemma 3 270M in August 2025 (its card
gives August 2024 for what it knows). Text of 2026 is after all three. It is *unseen*, not *unlike*:
it quotes older interfaces, formulas and licences, and much code of 2026 was written with the help
of language models, which nobody can tell from the text. Packages that say so were left out.

`--quick` reads two packages, without the cap. `--json` prints one flat object of figures.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urljoin

# pip has no public interface. These two calls give its settings (index, certificates, proxies).
# `pip download` will not do: to know a source archive's name it runs the archive's build code.
from pip._internal.commands import create_command
from pip._vendor.requests.exceptions import RequestException

from figures import command_line, show
from fusellm.errors import CorpusError, FusellmError
from fusellm.zoo import text as built_in
from fusellm.zoo.text import DOMAINS, PARTS, Document, drop_near_duplicates, part_of


@dataclass(frozen=True)
class Package:
    """A source archive, pinned.

    Attributes:
        first_upload: day of the first file of any version. Two ways agree: the least `upload-time`
            in the index, and `pip download --uploaded-prior-to 2026-01-01`, which finds no file.
        licence: as its metadata says. Copyright, where the archive tells it, is of 2026.
        left_out: beginnings of paths, found by looking: other people's files, other languages.
    """

    name: str
    version: str
    sha256: str
    first_upload: str
    licence: str
    left_out: tuple[str, ...] = ()


# In the comments: bytes of prose, Python and C++ that are written, after the cap (2026-11-28).
PACKAGES = (
    Package(  # prose 53,666; python 5,464; cpp 127,620
        "ellipsoid-tree",
        "0.2.0",
        "53fbbea53a4b15d161ab200ba06b16ab73b06615fb037968d8696b92125a5f9c",
        "2026-07-18",
        "MIT",
    ),
    Package(  # prose 23,101; python 63,303; cpp 75,109
        "falsealpha",
        "0.2.0",
        "3cadb8fc2dab25dff22a90c80243bfa2b6dfa44e41053b89d438e41635825063",
        "2026-10-12",
        "MIT",
    ),
    Package(  # python 319; cpp 118,150
        "fastsim-navigation",
        "0.1.2",
        "ebdfbb75775d69e8388ecf40418ac96be08c759509b757830d9de18fd0616979",
        "2026-08-18",
        "MIT",
        ("README.md",),  # in Chinese
    ),
    Package(  # prose 29,788; python 39,897; cpp 89,909
        "itch-book",
        "0.2.1",
        "171a9cb1a96749259f292c1a2777bdd285f5ae68d1fcf02dc7682c5606f23671",
        "2026-09-05",
        "MIT",
    ),
    Package(  # prose 6,544; python 24,384; cpp 107,416
        "kern-kde",
        "0.2.5",
        "0eead795a39592e3117f65966b75eb33ff1b1f7b79005e34260260a475eca5f5",
        "2026-06-14",
        "MIT",
    ),
    Package(  # prose 14,743; python 21,273; cpp 56,445
        "orderly-chaos",
        "0.2.0",
        "1be36c35cad840ad7fcde7ea21b97a7c319e8af9e9a23d9277c9661b32795ba9",
        "2026-10-07",
        "MIT",
    ),
    Package(  # prose 7,887; python 5,343; cpp 36,835
        "eqhunt",
        "0.0.5",
        "8c88c880f39d90c63035f45c46aeebedb52cd17fd54161fec1cf225bfa14fcd3",
        "2026-05-19",
        "MIT",
    ),
    Package(  # prose 7,706; python 14,910; cpp 31,223
        "pfcuda",
        "0.1.2",
        "fb10ac5b9f97b4dace135435d77d9bb621832de18fa94549c1f657614978743b",
        "2026-09-19",
        "MIT",
    ),
    Package(  # prose 149,247; python 134,198
        "tramage",
        "0.2.0",
        "39f46e76f99e0398a961e5c9d83752fedfff08a4a09957874d2d2b3651a78257",
        "2026-10-14",
        "MIT",
    ),
    Package(  # prose 17,052; python 124,947
        "fourbarhinge",
        "0.1.2",
        "24e15ee62bfe8945199c3a08a93c1b4ab4d0c284a89ee8b1c79a43a8cde0a219",
        "2026-10-01",
        "MIT",
        ("examples/",),  # in Spanish
    ),
    Package(  # prose 115,265; python 226,457
        "dsgelab",
        "0.5.0",
        "3f4ce1fca3330444c6de779517feade662dcfb9c95b3846b03d8237adebfc75d",
        "2026-10-18",
        "MIT",
    ),
    Package(  # prose 125,522; python 26,957
        "mutation-game",
        "0.1.5",
        "7011b8d26e643d92c38edbebd8be2525bacccdd81da254c5e3a24b481f1cfac1",
        "2026-04-07",
        "MIT",
        ("docs/api.rst", "docs/index.rst", "docs/explorations.rst"),  # lists of pages
    ),
    Package(  # prose 102,338; python 156,438
        "montyroll",
        "0.5.0",
        "94fd027c92c674bdff586a47390ff76481ea64f773bd28d98b28f9cfc3cecc3f",
        "2026-08-23",
        "MIT",
    ),
    Package(  # prose 104,596; python 122,809
        "heormodel",
        "0.7.4",
        "79d798a8092bd6c3b29cc8ffbd91d1dc6cd7176ba05e088aec25782f1f8d174c",
        "2026-07-05",
        "MIT",
    ),
    Package(  # prose 10,179; python 33,731
        "ast-pattern-engine",
        "1.0.2",
        "b37d77cbe44883a3692e6ffe8aab16674525d8b591ff6dc532ee04bf228c98cf",
        "2026-05-13",
        "MIT",
        ("docs/reference/",),  # names whose docstrings are meant
    ),
    Package(  # prose 8,570; python 37,041
        "purere2",
        "0.1.2",
        "668129e847b385a87685f3a51683ca1430b20ef4c194042582d463041a5a739e",
        "2026-06-19",
        "MIT",
    ),
    Package(  # prose 1,362; python 72,325
        "threedimensions",
        "1.0.0",
        "111284c4ff660d522b8721110fc09477fc45ce2bef4ee76a48c4761c73899b19",
        "2026-03-01",
        "MIT",
    ),
    Package(  # prose 2,684; python 26,508
        "legacy-doc",
        "0.2.1",
        "3573a034638af1ebbbe1a727baf18b2f69e6ad6439e4650be59aadc069a9bb42",
        "2026-05-28",
        "MIT",
    ),
)
QUICK = ("ast-pattern-engine", "eqhunt")

_FIRST_DAY = "2026-01-01"
_JSON_INDEX = "application/vnd.pypi.simple.v1+json"
_SUFFIXES = {"prose": {".md", ".rst"}, "python": {".py"}} | {
    "cpp": {".h", ".hpp", ".hxx", ".cpp", ".cc", ".cxx", ".c", ".cu", ".cuh"}
}
# Tests are no sample of a language's use; the rest is other people's, or made by programs.
_SKIPPED_FOLDERS = re.compile(
    r"tests?|third_?party|vendor(ed)?|extern(al)?|_?static|\..*|.*\.egg-info", re.IGNORECASE
)
_SKIPPED_FILES = re.compile(
    r"(licen[cs]e|copying|change_?log|third_?party|code_of_conduct|contributing|agents|claude).*"
    r"|test_.*|.*_tests?\..*|conftest\.py|setup\.py|conf\.py",
    re.IGNORECASE,
)
_MADE_BY_A_PROGRAM = re.compile(r"(auto-?|automatically )generated|do not edit|@generated", re.I)
_HEAD = 1000  # characters in which a program says that it made the file
_LONG_LINE = 400  # minified, or a table
_LEAST_LETTERS = 0.45  # of what is not white space; fewer are a table of numbers
_MOST_SHARE = 0.2  # of a domain from one package

_Texts = dict[str, list[Document]]


class Index:
    """The package index that pip is set up with, over pip's own connection."""

    def __init__(self) -> None:
        command: Any = create_command("download")
        options, _ = command.parse_args([])
        self._address: str = options.index_url.rstrip("/")
        self._session = command._build_session(options)

    def archive(self, package: Package) -> bytes:
        """The source archive.

        Raises:
            CorpusError: it cannot be had, is another than the pinned one, or the package has a
                file from before the day that the table gives.
        """
        page = f"{self._address}/{package.name}/"
        listing = self._read(page, package, {"Accept": _JSON_INDEX})
        try:
            files = json.loads(listing)["files"]
        except (ValueError, KeyError) as error:
            raise CorpusError(
                f"{package.name}: the index does not list files in JSON; point pip at one that does"
            ) from error
        # An index may leave upload times out; what was withdrawn since may move the first day up.
        days = [file["upload-time"][:10] for file in files if file.get("upload-time")]
        if days and min(days) < max(package.first_upload, _FIRST_DAY):
            raise CorpusError(
                f"{package.name}: first uploaded on {min(days)}, and the table says "
                f"{package.first_upload}; take the package out of the table"
            )
        wanted = f"{package.name.replace('-', '_')}-{package.version}.tar.gz"
        found = [file for file in files if file["filename"] == wanted]
        if not found:
            raise CorpusError(
                f"{package.name}: the index has no {wanted}; take the package out of the table"
            )
        content = self._read(urljoin(page, found[0]["url"]), package, {})
        digest = hashlib.sha256(content).hexdigest()
        if digest != package.sha256:
            raise CorpusError(
                f"{wanted}: SHA-256 is {digest}, not the pinned {package.sha256}; do not use it"
            )
        return content

    def _read(self, address: str, package: Package, headers: dict[str, str]) -> bytes:
        try:
            reply = self._session.get(address, headers=headers)
            reply.raise_for_status()
            return bytes(reply.content)
        except RequestException as error:
            raise CorpusError(
                f"{package.name}: pip's index cannot be read ({type(error).__name__}); "
                "check the network and `pip config list`"
            ) from error


def texts_of(package: Package, archive: bytes) -> _Texts:
    """A package's documents by domain, read from its archive without running anything."""
    found: _Texts = {domain: [] for domain in DOMAINS}
    with (
        tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened,
        tempfile.TemporaryDirectory() as folder,
    ):
        members = [member for member in opened.getmembers() if _is_wanted(member, package)]
        opened.extractall(folder, members=members, filter="data")
        for path in sorted(Path(folder, member.name) for member in members):
            for document in _of_file(package, Path(folder), path):
                if not _is_data(document):
                    found[document.domain].append(document)
    return {domain: _without_repeats(documents) for domain, documents in found.items()}


def _is_wanted(member: tarfile.TarInfo, package: Package) -> bool:
    parts = PurePosixPath(member.name).parts
    if not member.isfile() or len(parts) < 2:
        return False
    _, *folders, name = parts
    return (
        any(PurePosixPath(name).suffix in suffixes for suffixes in _SUFFIXES.values())
        and not any(map(_SKIPPED_FOLDERS.fullmatch, folders))
        and not _SKIPPED_FILES.fullmatch(name)
        and not "/".join([*folders, name]).startswith(package.left_out or ("\0",))
    )


def _of_file(package: Package, folder: Path, path: Path) -> Iterator[Document]:
    root = folder / path.relative_to(folder).parts[0]
    distribution = f"{package.name}-{package.version}"
    if path.suffix in _SUFFIXES["python"]:
        # As the built-in corpus does it: docstrings are prose, and the code is left without them.
        yield from built_in._of_python_file(
            distribution, root, path, frozenset(PARTS), frozenset(DOMAINS)
        )
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if built_in._is_code(text):  # by its size only
        name = f"{distribution}/{path.relative_to(root).as_posix()}"
        domain = "prose" if path.suffix in _SUFFIXES["prose"] else "cpp"
        yield Document(name, domain, part_of(name), text)


def _is_data(document: Document) -> bool:
    """Whether a text was made by a program or is mostly numbers."""
    text, is_prose = document.text, document.domain == "prose"  # whose paragraphs may be one line
    dense = "".join(text.split())
    return (
        _MADE_BY_A_PROGRAM.search(text[:_HEAD]) is not None
        or (not is_prose and max(map(len, text.splitlines())) > _LONG_LINE)
        or sum(map(str.isalpha, dense)) < _LEAST_LETTERS * len(dense)
    )


def _without_repeats(documents: Iterable[Document]) -> list[Document]:
    kept: list[Document] = []
    for document in documents:
        kept += drop_near_duplicates(kept, [document])[0]
    return kept


def capped(documents: Sequence[Document]) -> list[Document]:
    """As many documents as leave no package with more than a fifth of the bytes.

    Those that stay are chosen by their names' hashes, so that no folder is favoured.
    """
    by_package: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda one: _hash(one.name)):
        by_package.setdefault(_package_of(document), []).append(document)
    most = max((sum(map(_size, own)) for own in by_package.values()), default=0)
    while True:
        kept = [document for own in by_package.values() for document in _up_to(own, most)]
        sizes = sizes_by_package(kept)
        allowed = int(_MOST_SHARE * sizes.total())
        if not sizes or max(sizes.values()) <= allowed:
            return sorted(kept, key=lambda one: one.name)
        most = min(most - 1, allowed)


def _up_to(documents: Sequence[Document], most: int) -> list[Document]:
    kept, bytes_kept = [], 0
    for document in documents:
        if bytes_kept + _size(document) <= most:
            kept.append(document)
            bytes_kept += _size(document)
    return kept


def sizes_by_package(documents: Iterable[Document]) -> Counter[str]:
    """Bytes of text by package."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[_package_of(document)] += _size(document)
    return sizes


def _size(document: Document) -> int:
    return len(document.text.encode())


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _package_of(document: Document) -> str:
    return document.name.partition("/")[0].rpartition("-")[0]


def build(packages: Sequence[Package], is_capped: bool) -> _Texts:
    """All packages' documents, without what stands in the built-in corpus or in two packages."""
    index = Index()
    found: _Texts = {domain: [] for domain in DOMAINS}
    for package in packages:
        for domain, own in texts_of(package, index.archive(package)).items():
            found[domain] += drop_near_duplicates(found[domain], own)[0]
    for domain in DOMAINS:
        left, _ = drop_near_duplicates(built_in.documents(PARTS, [domain]), found[domain])
        found[domain] = capped(left) if is_capped else left
    return found


def write(found: _Texts, folder: Path) -> None:
    """One file a domain, one record a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in found.items():
        lines = (
            json.dumps(
                {"text": one.text, "name": one.name, "package": _package_of(one)},
                ensure_ascii=False,
            )
            for one in documents
        )
        content = "".join(f"{line}\n" for line in lines)
        (folder / f"{domain}.jsonl").write_text(content, encoding="utf-8")


def figures_of(found: _Texts) -> dict[str, float]:
    """Documents, bytes, packages and the largest package's share of each domain."""
    figures: dict[str, float] = {}
    for domain, documents in found.items():
        sizes = sizes_by_package(documents)
        figures |= {
            f"{domain} documents": len(documents),
            f"{domain} bytes": sizes.total(),
            f"{domain} packages": len(sizes),
            f"{domain} largest package": max(sizes.values(), default=0) / max(sizes.total(), 1),
        }
    everything = [document for documents in found.values() for document in documents]
    figures["packages"] = len(sizes_by_package(everything))
    return figures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    packages = [one for one in PACKAGES if not arguments.quick or one.name in QUICK]
    try:
        found = build(packages, is_capped=not arguments.quick)
    except FusellmError as error:
        sys.exit(str(error))
    write(found, arguments.folder)
    show(figures_of(found), arguments.json)


if __name__ == "__main__":
    main()
