"""A first look at a corpus: what each entry is, and its first record, before all of it is read."""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fusellm.config import CorpusSettings, Documents, FileDocuments, HubDocuments
from fusellm.corpus.documents import hub_records
from fusellm.corpus.fields import Fields
from fusellm.corpus.formats import kind_of, read_records
from fusellm.corpus.paths import files_of
from fusellm.progress import Progress, Silent

_LOOKED_AT = 100  # records of a file that may have another label
_SHOWN_FROM_FILES = 500  # a look takes some milliseconds a file


@dataclass(frozen=True)
class EntryFacts:
    """What a look at an entry of `corpus.documents` found.

    Attributes:
        domain: that its documents are counted under.
        kinds: how many files it has of each kind, such as "jsonl (gzip)"; none where it has no
            files of the user's.
        bytes: of its files, packed as they are.
        first: its first record's text, as far as it was read; None where there is none yet.
    """

    domain: str
    kinds: Mapping[str, int]
    bytes: int
    first: str | None


def look_at(corpus: CorpusSettings, progress: Progress) -> list[EntryFacts]:
    """Read the first record of every file, and of every dataset on the hub that is streamed.

    Where an entry asks for a label, the first with it, if it is among the first hundred of a file.

    Raises:
        CorpusError: a file is missing, damaged, of no known kind or no text, a record lacks a
            field, or a dataset cannot be reached.
    """
    return [_look(entry, progress) for entry in corpus.documents]


def _look(entry: Documents, progress: Progress) -> EntryFacts:
    if isinstance(entry, FileDocuments):
        return _look_at_files(entry, progress)
    first = None
    if isinstance(entry, HubDocuments) and entry.streaming:
        splits = (entry.split, entry.validation_split, entry.held_out_split)
        texts = [
            record.text
            for split in splits
            if split is not None
            for _, record in itertools.islice(hub_records(entry, split, _LOOKED_AT), 1)
        ]
        first = next(iter(texts), None)
    return EntryFacts(entry.domain, {}, 0, first)


def _look_at_files(entry: FileDocuments, progress: Progress) -> EntryFacts:
    paths, fields = files_of(entry), Fields.of(entry)
    kinds = [kind_of(path, entry.format) for path in paths]  # a wrong ending is told at once
    shown = progress if len(paths) >= _SHOWN_FROM_FILES else Silent()
    first = None
    with shown.start("looking at the corpus", len(paths), "files") as bar:
        for path, kind in zip(paths, kinds, strict=True):
            records = read_records(path, kind, fields)
            few = itertools.islice(records, _LOOKED_AT if fields.where else 1)
            record = next((one for one in few if one.wanted), None)
            if first is None and record is not None:
                first = record.text
            bar.advance()
    size = sum(path.stat().st_size for path in paths)
    return EntryFacts(entry.domain, Counter(map(str, kinds)), size, first)
