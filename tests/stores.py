"""Stores made without a model, and what damages them."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.store.externalized import kept_columns, source_schema, token_columns
from fusellm.store.fused import read_sets
from fusellm.store.identity import Identity
from fusellm.store.manifest import MANIFEST, StageFolder, read_manifest, segments_of
from fusellm.store.quantized import ERROR_NATS, STEP_NATS
from fusellm.store.tables import encode_table, write_encoded
from fusellm.store.writer import StageWriter
from fusellm.training.collator import OutcomeTable
from fusellm.training.rows import Rows, stored_blocks

IDENTITY = Identity(
    "externalize/made", {"dtype": "float32"}, {"weights": "w", "tokenizer": "t", "corpus": "c"}
)


class Made:
    """Blocks before they are written: ids and boundaries of each, and the positions of all."""

    def __init__(self, blocks: Sequence[tuple[bool, list[int], list[int]]], kept: Kept) -> None:
        """`blocks`: (usable, ids, ends) of each."""
        self.blocks, self.kept = blocks, kept
        lengths = [max(len(ids) - 1, 0) if usable else 0 for usable, ids, _ in blocks]
        self.positions = offsets_of(np.array(lengths, dtype=np.int64))

    def columns(self, sampled: bool, first: int = 0) -> dict[str, Any]:
        usable = np.array([usable for usable, _, _ in self.blocks], dtype=np.bool_)
        ends = [ends if usable else [] for usable, _, ends in self.blocks]
        numbers = first + np.arange(len(self.blocks))
        tokens = token_columns(
            numbers, usable, _ragged([ids for _, ids, _ in self.blocks]), _ragged(ends)
        )
        return tokens | kept_columns(self.kept, self.positions, sampled)


def _ragged(rows: Sequence[Sequence[int]]) -> Ragged:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Ragged(offsets_of(lengths), np.array([x for row in rows for x in row], dtype=np.int64))


def kept_of_rows(rows: Sequence[dict[str, Any]]) -> Kept:
    """Distributions of `distributions` or `draws`, one after another."""

    def flat(name: str, kind: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=kind), *(np.asarray(r[name], kind) for r in rows)])

    return Kept(
        offsets_of(np.array([len(row["ids"]) for row in rows], dtype=np.int64)),
        flat("ids", np.int64),
        flat("log_probs", np.float32),
        flat("counts", np.uint8),
        np.array([row["tail"] for row in rows], dtype=np.float32),
        np.array([row["true"] for row in rows], dtype=np.float32),
    )


def top(logits: np.ndarray, k: int, mass: float | None, chance: np.random.Generator) -> Any:
    """What a source keeps of a distribution (`top`), as fusellm.reading.selection does it."""
    z = np.sort(logits.astype(np.float32))[::-1]
    log_p = z - z[0] - np.log(np.exp(z - z[0]).sum(dtype=np.float32))
    p = np.exp(log_p[:k].astype(np.float64))
    count = len(p) if mass is None else max(1, int((np.cumsum(p)[:-1] < mass).sum()) + 1)
    ids = chance.permutation(len(z))[:count]
    tail = np.float32(max(0.0, 1.0 - p[:count].sum()))
    return {
        "ids": ids,
        "log_probs": log_p[:count],
        "counts": [],
        "tail": tail,
        "true": log_p[chance.integers(len(z))],
    }


def drawn(counts: Sequence[int], chance: np.random.Generator, true: float) -> dict[str, Any]:
    """What a source keeps of a distribution (`sampled`)."""
    ids = np.sort(chance.permutation(5 * len(counts))[: len(counts)])
    return {"ids": ids, "log_probs": [], "counts": counts, "tail": 0.0, "true": true}


def write_store(
    path: Path,
    shards: Sequence[Made | None],
    sampled: bool,
    k: int = 10,
    vocabulary: int = 60_000,
    finish: bool = True,
    identity: Identity = IDENTITY,
    **about: Any,
) -> None:
    """A store as the stage writes it; a shard that is None is left out, with 200 blocks."""
    scheme = "sampled" if sampled else "top"
    schema = source_schema(vocabulary, scheme, k)
    model = {"model": "made", "revision": None, "architecture": "Made", "commit": None}
    kept = {"scheme": scheme, "draws": 8, "k": k, "mass": 0.99}
    with StageWriter.open(path, identity) as folder:
        folder.describe(
            {"kind": "distributions", **model, "weights_sha256": "0" * 64, "dtype": "float32"}
            | {"vocabulary": vocabulary, "externalize": kept, "step_nats": STEP_NATS}
            | {"error_nats": ERROR_NATS, "device": "cpu"}
            | about
        )
        first = 0
        for n, made in enumerate(shards):
            if made is not None:
                aside = [
                    [first + row, f"document {row}\x1b[2J", "its tokenizer changes the text"]
                    for row, (usable, _, _) in enumerate(made.blocks)
                    if not usable
                ]
                counts = {
                    "tokens": sum(len(ids) for _, ids, _ in made.blocks),
                    "positions": len(made.kept.tail),
                    "kept": len(made.kept.ids),
                    "aside": aside,
                }
                encoded = encode_table(made.columns(sampled, first), schema)
                write_encoded(folder, f"train-{n:05d}.arrow", encoded, counts)
            first += 200 if made is None else len(made.blocks)
        if finish:
            folder.finish({})


@cache
def some(blocks: int, sampled: bool, seed: int = 0, tokens: int = 7) -> Made:
    """Blocks of random distributions, every ninth of them not usable."""
    chance = np.random.default_rng(seed)
    rows, found = [], []
    for n in range(blocks):
        ids = chance.integers(0, 60_000, int(chance.integers(1, tokens))).tolist()
        ends = np.cumsum(chance.integers(0, 6, len(ids))).tolist()
        usable = n % 9 != 4
        found.append((usable, ids, ends))
        for _ in range(len(ids) - 1 if usable else 0):
            if sampled:
                counts = chance.multinomial(4, [0.25] * 4) + 1
                rows.append(drawn(counts.tolist(), chance, float(-chance.exponential(3))))
            else:
                rows.append(top(chance.normal(0, 3, 40), 10, 0.99, chance))
    return Made(found, kept_of_rows(rows))


def flip(path: Path, offset: int, by: int = 1) -> None:
    """Change one byte of a file, in a new file: the old one may be mapped."""
    data = bytearray(path.read_bytes())
    data[offset] ^= by
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


def middle_of(folder: StageFolder, name: str, segment: int) -> int:
    """Offset in the middle of a segment of a shard."""
    lengths = [length for length, _ in folder.segments(name)]
    return sum(lengths[:segment]) + lengths[segment] // 2


Columns = dict[str, Any]


def columns_of(path: Path, name: str) -> tuple[Columns, pa.Schema]:
    """All columns of a shard, that may be changed, and its schema; nothing is checked."""
    table = pyarrow.ipc.open_file(str(path / name)).read_all().combine_chunks()
    found: Columns = {}
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if pa.types.is_list(field.type):
            values = column.values.to_numpy(zero_copy_only=False).copy()
            found[field.name] = Ragged(column.offsets.to_numpy().astype(np.int64), values)
        else:
            found[field.name] = np.array(column.to_numpy(zero_copy_only=False))
    return found, table.schema


def rewrite(path: Path, name: str, data: bytes, cuts: Sequence[int], **counts: Any) -> None:
    """Put other bytes in a shard's place, with checksums that are right."""
    manifest = read_manifest(path / MANIFEST)
    entry = manifest.shards[name]
    replace(path / name, data)
    manifest.shards[name] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "segments": [list(segment) for segment in segments_of(data, cuts)],
        "counts": entry["counts"] | counts,
    }
    replace(path / MANIFEST, manifest.to_bytes())


def rewrite_columns(path: Path, name: str, change: Callable[[Columns], object]) -> None:
    """Change a shard's columns, with checksums that are right."""
    columns, schema = columns_of(path, name)
    change(columns)
    encoded = encode_table(columns, schema)
    cuts = np.cumsum([segment.length for segment in encoded.segments])[:-1].tolist()
    rewrite(path, name, encoded.data, cuts)


def fused_rows(run: Path, corpus: StageFolder, seed: int = 0) -> Rows:
    """A run's rows, a block each, with fused distributions."""
    return Rows(stored_blocks(run, corpus, True, seed), seed)


def clm_rows(run: Path, corpus: StageFolder, seed: int = 0, prefix_tokens: int = 0) -> Rows:
    """A run's rows, a block each, as the CLM baseline reads them."""
    return Rows(stored_blocks(run, corpus, False, seed, None, prefix_tokens), seed)


def outcome_table(
    folder: StageFolder, sources: Sequence[str], renormalize: bool = False, temperature: float = 1.0
) -> OutcomeTable:
    """The outcomes of some sources of a fused store."""
    sets = [read_sets(folder, source) for source in sources]
    return OutcomeTable(sets, renormalize, temperature)
