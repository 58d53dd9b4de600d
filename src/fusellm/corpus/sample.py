"""A few blocks of a corpus, before it is made."""

import itertools
from collections.abc import Iterator

from fusellm.config import BuiltinDocuments, CorpusSettings, Documents, HubDocuments
from fusellm.corpus.conversations import within
from fusellm.corpus.documents import file_records, hub_records
from fusellm.corpus.parts import Text
from fusellm.errors import CorpusError
from fusellm.store.blocks import Block
from fusellm.tokens.blocks import cut
from fusellm.zoo import text as zoo_text

_BLOCKS_OF_AN_ENTRY = 64
_BLOCKS_OF_A_DOCUMENT = 4  # the beginnings of many documents say more than a few whole ones


def first_blocks(corpus: CorpusSettings) -> list[Block]:
    """Blocks of the first documents of each entry, some 64 of each.

    Of a dataset of the hub there are none unless it is streamed: it would be downloaded.

    Raises:
        CorpusError: a document cannot be read, or there is no text in any.
    """
    sampled: list[Block] = []
    for entry in corpus.documents:
        blocks = (
            block
            for text in _texts(entry)
            if text.text.strip()  # the corpus leaves the others out
            for block in _blocks(text, entry.domain, corpus.block_bytes)
        )
        sampled += itertools.islice(blocks, _BLOCKS_OF_AN_ENTRY)
    unread = [
        one for one in corpus.documents if isinstance(one, HubDocuments) and not one.streaming
    ]
    if not sampled and not unread and not corpus.generated:
        domains = ", ".join(dict.fromkeys(entry.domain for entry in corpus.documents))
        raise CorpusError(
            f"corpus.documents has no text: all its documents ({domains}) are empty; check their "
            "paths and text_field"
        )
    return sampled


def _blocks(text: Text, domain: str, block_bytes: int) -> Iterator[Block]:
    """The first blocks of a document; none of them is said to end it."""
    if text.conversation is not None:
        fitting = within(text.conversation, block_bytes)
        if fitting is not None:
            yield Block(0, text.name, domain, False, fitting[0].text, (), fitting[0])
        return
    for block in itertools.islice(cut(text.text, block_bytes), _BLOCKS_OF_A_DOCUMENT):
        yield Block(0, text.name, domain, False, block)


def _texts(entry: Documents) -> Iterator[Text]:
    if isinstance(entry, BuiltinDocuments):
        documents = zoo_text.documents(["train"], [entry.builtin])
        return (Text(document.name, "train", document.text) for document in documents)
    if not isinstance(entry, HubDocuments):
        records = file_records(entry)
    elif entry.streaming:
        records = hub_records(entry, entry.split)
    else:
        return iter(())
    return (Text.of(name, "train", record) for name, record in records)
