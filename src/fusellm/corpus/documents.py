"""Documents of a corpus: from the built-in corpus, the hub, or files.

Each reader yields documents in a fixed order; what is odd about them is handled and counted.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from fusellm.config import BuiltinDocuments, CorpusSettings, Documents, FileDocuments, HubDocuments
from fusellm.corpus.fields import Fields
from fusellm.corpus.formats import FileRecord, kind_of, read_records
from fusellm.corpus.parts import Named, Text, in_parts
from fusellm.corpus.paths import files_of, relative_names
from fusellm.errors import CorpusError
from fusellm.progress import Progress
from fusellm.zoo import text as zoo_text

_NAMED = 5  # files, or labels, that a message names
_HUB_FAULTS = (OSError, ValueError, RuntimeError, DatasetsError)
"""What `datasets` raises where a dataset is missing, damaged or out of reach."""


def read_documents(
    entry: Documents,
    corpus: CorpusSettings,
    counts: Counter[str],
    builtin: "BuiltinReader",
) -> Iterator[Text]:
    """All documents of one entry of the corpus.

    Raises:
        CorpusError: while they are read: one is missing or damaged, or lacks a field.
    """
    if isinstance(entry, BuiltinDocuments):
        return builtin.texts(entry.builtin, counts)
    if isinstance(entry, HubDocuments):
        return _hub(entry, corpus, counts)
    return in_parts(lambda: file_records(entry), corpus, counts)


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


def _hub(entry: HubDocuments, corpus: CorpusSettings, counts: Counter[str]) -> Iterator[Text]:
    splits = {"validation": entry.validation_split, "held_out": entry.held_out_split}
    apart = {part: split for part, split in splits.items() if split is not None}
    for part, split in apart.items():
        for name, record in hub_records(entry, split):
            yield Text.of(name, part, record)
    yield from in_parts(lambda: hub_records(entry, entry.split), corpus, counts, apart)


def hub_records(entry: HubDocuments, split: str, most: int | None = None) -> Iterator[Named]:
    """Name and record of every document of a split of a dataset on the hub.

    Args:
        most: rows that are looked at; all if None.

    Raises:
        CorpusError: it cannot be read, or a record lacks a field.
    """
    fields = Fields.of(entry)
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            entry.hub, entry.config, split=split, revision=entry.revision, streaming=entry.streaming
        )
        named = (
            (
                f"{entry.hub}/{entry.config or ''}/{split}:{number}",
                FileRecord.of(fields, row, f"{entry.hub}:{split}:{number}"),
            )
            for number, row in enumerate(itertools.islice(rows, most))
        )
        if most is None:
            yield from _chosen(named, fields, f"dataset {entry.hub!r}, split {split!r},")
        else:
            yield from (one for one in named if one[1].wanted)
    except _HUB_FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise CorpusError(
            f"corpus.documents: dataset {entry.hub!r}, split {split!r} cannot be read: {reason}; "
            "check its name and splits, and the connection"
        ) from error


def file_records(entry: FileDocuments) -> Iterator[Named]:
    """Name and record of every document of an entry's files.

    Raises:
        CorpusError: a file is missing, damaged or of no known kind, or a record lacks a field.
    """
    paths, fields = files_of(entry), Fields.of(entry)
    named = (
        (f"{name}:{number}", record)
        for path, name in zip(paths, relative_names(paths), strict=True)
        for number, record in enumerate(read_records(path, kind_of(path, entry.format), fields))
    )
    yield from _chosen(named, fields, ", ".join(map(str, paths[:_NAMED])))


def _chosen(named: Iterator[Named], fields: Fields, place: str) -> Iterator[Named]:
    """Those records that the entry asks for.

    Raises:
        CorpusError: there are records, and none of them.
    """
    labels: dict[str, None] = {}
    chosen = False
    for name, record in named:
        if record.wanted:
            chosen = True
            yield name, record
        elif len(labels) < _NAMED:
            labels[record.text] = None
    if labels and not chosen:
        raise fields.none_chosen(place, list(labels))
