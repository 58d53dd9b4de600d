"""Documents of a corpus: from the built-in corpus, the hub, or files.

Each reader yields documents in a fixed order; what is odd about them is handled and counted.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet

from fusellm.config import BuiltinDocuments, CorpusSettings, Documents, FileDocuments, HubDocuments
from fusellm.errors import CorpusError
from fusellm.progress import Progress
from fusellm.stages.corpus.fields import Fields, Spans
from fusellm.zoo import text as zoo_text

PARTS = ("train", "validation", "held_out")


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        name: finds it again.
        part: that it belongs to.
        text: of it.
        context: bytes of its text in UTF-8 that a model is not asked to predict.
    """

    name: str
    part: str
    text: str
    context: Spans = ()


def part_by_hash(text: str, corpus: CorpusSettings) -> str:
    """The part of a document of a corpus that has none of its own, by a hash of its text.

    Equal documents therefore never stand on two sides.
    """
    drawn = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
    share = drawn / 2**64
    if share < corpus.held_out_share:
        return "held_out"
    return "validation" if share < corpus.held_out_share + corpus.validation_share else "train"


def files_of(entry: FileDocuments) -> list[Path]:
    """The files of an entry, in order.

    Raises:
        CorpusError: a pattern fits no file.
    """
    patterns = [entry.files] if isinstance(entry.files, str) else entry.files
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        base = Path(path.anchor)
        matches = sorted(p for p in base.glob(str(path.relative_to(base))) if p.is_file())
        if not matches:
            raise CorpusError(
                f"corpus.documents: no file fits {pattern!r}; check the path, which is relative to "
                "the recipe's folder"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Paths below their common folder: names that do not change when the folder is moved.

    >>> relative_names([Path("/data/a/x.txt"), Path("/data/b/x.txt")])
    ['a/x.txt', 'b/x.txt']
    """
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).as_posix() for path in paths]


def read_documents(
    entry: Documents,
    corpus: CorpusSettings,
    counts: Counter[str],
    builtin: "BuiltinReader",
) -> Iterator[Text]:
    """All documents of one entry of the corpus."""
    if isinstance(entry, BuiltinDocuments):
        return builtin.texts(entry.builtin, counts)
    if isinstance(entry, HubDocuments):
        return _hub(entry, corpus)
    return _files(entry, corpus, counts)


class BuiltinReader:
    """The built-in corpus, read in one pass over the files for all domains of a recipe."""

    def __init__(self, corpus: CorpusSettings, progress: Progress) -> None:
        entries = [e for e in corpus.documents if isinstance(e, BuiltinDocuments)]
        self._domains = list(dict.fromkeys(entry.builtin for entry in entries))
        self._progress = progress
        self._documents: list[zoo_text.Document] | None = None

    def texts(self, domain: str, counts: Counter[str]) -> Iterator[Text]:
        """One domain's documents, without near-duplicates across the parts."""
        if self._documents is None:
            files = zoo_text.count_files(self._domains)
            with self._progress.start("reading installed text", files, "files") as bar:
                read = zoo_text.documents(zoo_text.PARTS, self._domains, bar.advance)
                self._documents = list(read)
        own = [document for document in self._documents if document.domain == domain]
        parts = {part: [d for d in own if d.part == part] for part in zoo_text.PARTS}
        apart = parts["validation"] + parts["held_out"]
        training, dropped = zoo_text.drop_near_duplicates(apart, parts["train"])
        # And the other way round: nothing is measured on that stands in any model's training text.
        apart, dropped_apart = zoo_text.drop_near_duplicates(training + parts["zoo"], apart)
        counts["near_duplicates_dropped"] += dropped + dropped_apart
        # In the order of a hash, so that a budget takes a sample of all packages.
        kept = apart + training
        kept.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
        return (Text(document.name, document.part, document.text) for document in kept)


def _hub(entry: HubDocuments, corpus: CorpusSettings) -> Iterator[Text]:
    fields = Fields.of(entry)
    splits = {
        "validation": entry.validation_split,
        "held_out": entry.held_out_split,
        "train": entry.split,
    }
    for part, split in splits.items():
        if split is None:
            continue
        try:
            rows = datasets.load_dataset(
                entry.hub,
                entry.config,
                split=split,
                revision=entry.revision,
                streaming=entry.streaming,
            )
        except (OSError, ValueError, ConnectionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CorpusError(
                f"corpus.documents: dataset {entry.hub!r}, split {split!r} cannot be read: {reason}"
            ) from error
        for number, row in enumerate(rows):
            text, context = fields.text(row, f"{entry.hub}:{split}:{number}")
            own = part if part != "train" else part_by_hash(text, corpus)
            if own != part and splits[own] is not None:
                own = "train"  # that part has a split of its own
            name = f"{entry.hub}/{entry.config or ''}/{split}:{number}"
            yield Text(name, own, text, context)


def _files(entry: FileDocuments, corpus: CorpusSettings, counts: Counter[str]) -> Iterator[Text]:
    paths = files_of(entry)
    for path, name in zip(paths, relative_names(paths), strict=True):
        for number, (text, context) in enumerate(_file_texts(path, Fields.of(entry), counts)):
            yield Text(f"{name}:{number}", part_by_hash(text, corpus), text, context)


def _file_texts(path: Path, fields: Fields, counts: Counter[str]) -> Iterator[tuple[str, Spans]]:
    if path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        for name in fields.names:
            if name not in file.schema_arrow.names:
                raise CorpusError(
                    f"{path} has no column {name!r}; it has "
                    f"{', '.join(file.schema_arrow.names)} (set text_field)"
                )
        for batch in file.iter_batches(batch_size=256, columns=list(fields.names)):
            for row in batch.to_pylist():
                yield fields.text(row, str(path))
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield fields.text(_json_row(path, number, line, counts), f"{path}:{number}")
    elif fields.context:
        raise CorpusError(
            f"{path} is text without fields, and context_fields names some; leave it out of files"
        )
    else:
        yield _decode(path.read_bytes(), counts), ()


def _json_row(path: Path, number: int, line: bytes, counts: Counter[str]) -> object:
    try:
        return json.loads(_decode(line, counts))
    except ValueError as error:
        raise CorpusError(f"{path}:{number} is not JSON: {error}; mend or drop the line") from None


def _decode(data: bytes, counts: Counter[str]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        counts["documents_with_invalid_utf8"] += 1
        return data.decode("utf-8", "replace")
