"""A few blocks of a corpus, before it is made."""

import itertools
from collections.abc import Iterator

from fusellm.config import BuiltinDocuments, CorpusSettings, Documents, HubDocuments
from fusellm.corpus.documents import file_records, hub_records
from fusellm.corpus.parts import Text
from fusellm.errors import CorpusError
from fusellm.tokens.blocks import cut
from fusellm.zoo import text as zoo_text

_BLOCKS_OF_AN_ENTRY = 64
_BLOCKS_OF_A_DOCUMENT = 4  # the beginnings of many documents say more than a few whole ones


def first_blocks(corpus: CorpusSettings) -> list[str]:
    """Blocks of the first documents of each entry, some 64 of each.

    Of a dataset of the hub there are none unless it is streamed: it would be downloaded.

    Raises:
        CorpusError: a document cannot be read, or there is no text in any.
    """
    sampled: list[str] = []
    for entry in corpus.documents:
        blocks = (
            block
            for text in _texts(entry)
            if text.strip()  # the corpus leaves the others out
            for block in itertools.islice(cut(text, corpus.block_bytes), _BLOCKS_OF_A_DOCUMENT)
        )
        sampled += itertools.islice(blocks, _BLOCKS_OF_AN_ENTRY)
    unread = [
        one for one in corpus.documents if isinstance(one, HubDocuments) and not one.streaming
    ]
    if not sampled and not unread:
        domains = ", ".join(dict.fromkeys(entry.domain for entry in corpus.documents))
        raise CorpusError(
            f"corpus.documents has no text: all its documents ({domains}) are empty; check their "
            "paths and text_field"
        )
    return sampled


def _texts(entry: Documents) -> Iterator[str]:
    if isinstance(entry, BuiltinDocuments):
        return (document.text for document in zoo_text.documents(["train"], [entry.builtin]))
    if not isinstance(entry, HubDocuments):
        records = file_records(entry)
    elif entry.streaming:
        records = hub_records(entry, entry.split)
    else:
        return iter(())
    return (Text.of(name, "train", record).text for name, record in records)
