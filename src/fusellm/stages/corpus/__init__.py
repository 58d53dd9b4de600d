"""corpus: documents to blocks, once for all models."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fusellm.config import BuiltinDocuments, FileDocuments, HubDocuments, Recipe
from fusellm.errors import CorpusError
from fusellm.progress import Bar, Progress
from fusellm.stages.corpus.documents import (
    PARTS,
    BuiltinReader,
    Text,
    files_of,
    read_documents,
    relative_names,
)
from fusellm.stages.corpus.fields import Spans
from fusellm.store.blocks import (
    BLOCKS_SCHEMA,
    BLOCKS_WITH_CONTEXT_SCHEMA,
    Block,
    block_columns,
    corpus_folder,
)
from fusellm.store.files import file_digest
from fusellm.store.identity import Identity, digest
from fusellm.store.tables import write_table
from fusellm.store.writer import StageWriter, software_versions
from fusellm.tokens.blocks import cut
from fusellm.tokens.context import spans_within

# Of a document in the parts validation and held_out no more than this is taken.
_MEASURED_DOCUMENT_BYTES = 8192


def identity(recipe: Recipe, target_tokenizer: str) -> Identity:
    """What the corpus is made from.

    Args:
        target_tokenizer: fingerprint of the target's tokenizer, which a budget in tokens reads.
    """
    settings = {"corpus": recipe.corpus.identity()}
    inputs: dict[str, str] = {}
    for n, entry in enumerate(recipe.corpus.documents):
        if isinstance(entry, BuiltinDocuments):
            versions = software_versions()
            inputs[f"documents.{n}"] = digest(
                {name: versions[name] for name in ("python", "torch", "transformers", "numpy")}
            )
        elif isinstance(entry, FileDocuments):
            paths = files_of(entry)
            names = relative_names(paths)
            sums = [[name, file_digest(p)] for name, p in zip(names, paths, strict=True)]
            inputs[f"documents.{n}"] = digest(sums)
        elif isinstance(entry, HubDocuments):
            inputs[f"documents.{n}"] = digest([entry.hub, entry.config, entry.revision])
    if recipe.corpus.train_tokens is not None:
        inputs["target_tokenizer"] = target_tokenizer
    return Identity("corpus", settings, inputs)


def run_corpus(
    recipe: Recipe,
    run: Path,
    identity_: Identity,
    count_tokens: Callable[[str], int],
    progress: Progress,
) -> None:
    """Write the corpus of a run.

    Raises:
        CorpusError: a part has no text.
    """
    with StageWriter.open(corpus_folder(run), identity_) as folder:
        if folder.complete:
            return
        corpus = recipe.corpus
        schema = BLOCKS_WITH_CONTEXT_SCHEMA if corpus.has_context else BLOCKS_SCHEMA
        parts = {part: _PartWriter(folder, part, schema, corpus.shard_blocks) for part in PARTS}
        counts: Counter[str] = Counter()
        in_tokens = recipe.corpus.train_tokens is not None
        measure, unit = (count_tokens, "tokens") if in_tokens else (_utf8_bytes, "bytes")
        most_validation = float(recipe.corpus.validation_bytes)
        most_held_out = float(recipe.corpus.held_out_bytes)
        measured: dict[tuple[str, str], float] = {}
        builtin = BuiltinReader(recipe.corpus, progress)
        for entry, budget in _budgets(recipe):
            texts = read_documents(entry, recipe.corpus, counts, builtin)
            room = {
                "train": budget,
                "validation": measured.get((entry.domain, "validation"), most_validation),
                "held_out": measured.get((entry.domain, "held_out"), most_held_out),
            }
            total = 0.0 if budget == float("inf") else budget
            with progress.start(f"cutting {entry.domain} into blocks", total, unit) as bar:
                own = isinstance(entry, HubDocuments) and entry.has_own_splits
                _take(recipe, entry.domain, room, measure, texts, own, parts, counts, bar)
            measured |= {(entry.domain, part): room[part] for part in ("validation", "held_out")}
        for part in parts.values():
            part.close()
        _require_text(recipe, parts)
        summary = {part: dict(writer.bytes_by_domain) for part, writer in parts.items()}
        folder.finish({"bytes": summary, **+counts})


def _budgets(recipe: Recipe) -> Iterator[tuple[Any, float]]:
    whole = recipe.corpus.train_tokens or recipe.corpus.train_bytes or float("inf")
    weights = sum(entry.weight for entry in recipe.corpus.documents)
    for entry in recipe.corpus.documents:
        yield entry, whole * entry.weight / weights


def _take(
    recipe: Recipe,
    domain: str,
    room: dict[str, float],
    measure: Callable[[str], int],
    texts: Iterator[Text],
    measured_first: bool,
    parts: dict[str, "_PartWriter"],
    counts: Counter[str],
    bar: Bar,
) -> None:
    """Cut documents into blocks until there is no room in any part; `room` goes down.

    `measured_first` says that nothing to measure on comes after the first training document.
    """
    for document in texts:
        if not document.text.strip():
            counts["empty_documents"] += 1
            continue
        if room[document.part] <= 0:
            spent = measured_first and document.part == "train"
            if spent or not any(left > 0 for left in room.values()):
                break
            continue
        text = document.text.encode("utf-8", "replace").decode("utf-8")
        blocks = list(cut(text, recipe.corpus.block_bytes))
        whole = len(blocks)
        if document.part == "train":
            size = measure(text)
            bar.advance(size)
        else:  # many beginnings say more than a few long documents
            blocks = _leading(blocks, min(_MEASURED_DOCUMENT_BYTES, room[document.part]))
            size = sum(map(_utf8_bytes, blocks))
        room[document.part] -= size
        start = 0
        for n, block in enumerate(blocks):
            end = start + _utf8_bytes(block)
            context = spans_within(document.context, start, end)
            parts[document.part].add(document.name, domain, n == whole - 1, block, context)
            counts["context_bytes"] += sum(b - a for a, b in context)
            start = end
        counts[f"documents_{document.part}"] += 1


def _leading(blocks: Sequence[str], most_bytes: float) -> list[str]:
    """The first block, and those after it that fit in `most_bytes` together with it."""
    sizes = itertools.accumulate(map(_utf8_bytes, blocks))
    return list(blocks[: max(1, sum(size <= most_bytes for size in sizes))])


def _utf8_bytes(text: str) -> int:
    return len(text.encode())


def _require_text(recipe: Recipe, parts: dict[str, "_PartWriter"]) -> None:
    cures = {
        "train": "check the paths and text_field of corpus.documents",
        "validation": "raise corpus.validation_share, or name a validation_split",
        "held_out": "raise corpus.held_out_share, or name a held_out_split",
    }
    for part, cure in cures.items():
        if parts[part].blocks == 0:
            raise CorpusError(f"the corpus {recipe.name!r} has no text in its part {part}; {cure}")


class _PartWriter:
    """Collects one part's blocks and writes them shard by shard."""

    def __init__(
        self, folder: StageWriter, part: str, schema: pa.Schema, shard_blocks: int
    ) -> None:
        self._folder, self._part = folder, part
        self._schema, self._shard_blocks = schema, shard_blocks
        self._pending: list[Block] = []
        self._shards = 0
        self.blocks = 0
        self.bytes_by_domain: defaultdict[str, int] = defaultdict(int)

    def add(self, document: str, domain: str, last: bool, text: str, context: Spans) -> None:
        self._pending.append(Block(self.blocks, document, domain, last, text, context))
        self.blocks += 1
        self.bytes_by_domain[domain] += _utf8_bytes(text)
        if len(self._pending) == self._shard_blocks:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()

    def _write(self) -> None:
        name = f"{self._part}-{self._shards:05d}.arrow"
        if name not in self._folder.shards:
            columns = block_columns(self._pending, self._schema)
            most = max(_utf8_bytes(block.text) for block in self._pending)
            write_table(self._folder, name, columns, self._schema, {"longest_bytes": most})
        self._shards += 1
        self._pending = []
