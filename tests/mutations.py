"""Stores that somebody else made, with checksums that are right and values that may be wrong.

A mutation is *refused* where it breaks one of docs/store-format.md's rules, which `legal` tells in
plain Python, and is *legal data* where it breaks none: then what is read is what was written. Any
other end is a fault: a crash, another error, or wrong values given out in silence.
"""

import copy
import hashlib
import json
import math
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from safetensors.numpy import save

from fusellm.alignment.translation import VocabularyMap, map_translation
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.errors import StoreError
from fusellm.fusion.carry import carry, map_counts
from fusellm.fusion.cross_entropy import nats_by_byte
from fusellm.fusion.healing import heal
from fusellm.store import externalized, fused
from fusellm.store.blocks import BLOCKS, BLOCKS_WITH_CONTEXT_SCHEMA, Block, block_columns
from fusellm.store.externalized import kept_of, tokens_of
from fusellm.store.identity import Identity
from fusellm.store.layout import Layout
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.measured import NATS, NATS_SCHEMA
from fusellm.store.opened import open_store
from fusellm.store.tables import BATCH_BLOCKS, Shard, write_table
from fusellm.store.translations import cached_translation
from fusellm.store.verify import verify_stage
from fusellm.store.writer import StageWriter
from stores import Columns, columns_of, replace, rewrite, some, write_store

VOCABULARY, K, DRAWS = 60_000, 10, 8
SHARD = "train-00000.arrow"
KINDS = ("sampled", "top", "target", "corpus", "fuse", "outcomes", "nats")


def make(root: Path, run: Path) -> None:
    """A folder of each kind; the target's tokens and what is fused are of a run."""
    for kind in ("sampled", "top"):
        write_store(root / kind, [some(70, kind == "sampled", 1)], kind == "sampled", k=K)
    shutil.copytree(run / "externalize" / "target", root / "target")
    for kind in ("fuse", "outcomes"):
        shutil.copytree(run / "fuse", root / kind)
    blocks = [
        Block(n, f"d{n}", "prose", n % 3 == 2, "naïve text " * (n + 1), ((0, 3), (3, n + 4)))
        for n in range(66)
    ]
    with StageWriter.open(root / "corpus", Identity("corpus", {}, {})) as folder:
        columns = block_columns(blocks, BLOCKS_WITH_CONTEXT_SCHEMA)
        write_table(folder, SHARD, columns, BLOCKS_WITH_CONTEXT_SCHEMA)
        folder.finish({})
    with StageWriter.open(root / "nats", Identity("evaluate", {}, {})) as folder:
        nats = [np.array([np.nan, 0.5, n, np.inf]) for n in range(66)]
        write_table(folder, SHARD, {"block": range(66), "nats": nats}, NATS_SCHEMA)
        folder.finish({})


def name_of(kind: str) -> str:
    """The shard that is changed."""
    return fused.sets_shard("first") if kind == "outcomes" else SHARD


def layout_of(kind: str, folder: StageFolder) -> Layout:
    """What its shards must be."""
    if kind in ("sampled", "top", "target"):
        return externalized.layout_of(folder)
    if kind == "outcomes":
        return fused.sets_layout()
    return {"corpus": BLOCKS, "nats": NATS}.get(kind) or fused.layout_of(folder)


# What the documents say, value by value.


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """Columns as one dict a row."""
    count = min(len(c.offsets) - 1 if isinstance(c, Ragged) else len(c) for c in columns.values())
    return [
        {
            name: column.values[column.offsets[n] : column.offsets[n + 1]].tolist()
            if isinstance(column, Ragged)
            else column[n]
            for name, column in columns.items()
        }
        for n in range(count)
    ]


def legal(kind: str, columns: Columns, folder: StageFolder) -> bool:
    """Whether columns are as docs/store-format.md has them."""
    rows = rows_of(columns)
    if "block" in columns and [row["block"] for row in rows] != list(range(len(rows))):
        return False
    if kind == "outcomes":
        return len(rows) == 1 and _sets(rows[0])
    if kind == "fuse":
        sets = [fused.read_sets(folder, name) for name in ("first", "second")]
        return all(_fused(row, len(sets[0].ids), sets) for row in rows)
    rule = {"sampled": _sampled, "top": _top, "corpus": _corpus, "nats": _nats}
    size = folder.about.get("vocabulary", 0)
    return all(rule[kind](row) if kind in rule else _tokens(row, size) for row in rows)


def _tokens(row: dict[str, Any], vocabulary: int) -> bool:
    expected = len(row["ids"]) if row["read"] else 0
    return all(0 <= i < vocabulary for i in row["ids"]) and len(row["bytes"]) == expected


def _pieces(values: list[Any], lengths: list[int]) -> list[list[Any]] | None:
    """Runs of these lengths; None where there are more or fewer values."""
    if sum(lengths) != len(values):
        return None
    ends = np.cumsum(lengths).tolist()
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _source(row: dict[str, Any], most: int) -> list[list[int]] | None:
    ids = _pieces(row["kept_ids"], row["kept"])
    positions = max(len(row["bytes"]) - 1, 0)
    fits = (
        _tokens(row, VOCABULARY)
        and len(row["kept"]) == len(row["true_log_prob"]) == positions
        and all(1 <= n <= most for n in row["kept"])
        and all(0 <= i < VOCABULARY for i in row["kept_ids"])
    )
    return ids if fits else None


def _sampled(row: dict[str, Any]) -> bool:
    ids, counts = _source(row, DRAWS), _pieces(row["counts"], row["kept"])
    if ids is None or counts is None:
        return False
    ascend = all(a < b for piece in ids for a, b in pairwise(piece))
    return ascend and all(sum(piece) == DRAWS and min(piece) >= 1 for piece in counts)


def _top(row: dict[str, Any]) -> bool:
    drops = _pieces(row["drops"], row["kept"])
    if _source(row, K) is None or drops is None or len(row["tail"]) != len(row["kept"]):
        return False
    for piece, tail in zip(drops, row["tail"], strict=True):
        kept = sum(math.exp(-steps / 64) for steps in np.cumsum(piece, dtype=np.int64).tolist())
        whole = kept + math.exp(-tail / 64)
        if whole <= 0 or abs(math.log(whole)) > 1 / 64:
            return False
    return True


def _fused(row: dict[str, Any], vocabulary: int, sets: list[OutcomeSets]) -> bool:
    parts = _pieces(row["source"], row["parts"])
    rests, lengths = _pieces(row["rest"], row["parts"]), _pieces(row["lengths"], row["parts"])
    outcomes = _pieces(row["outcomes"], row["lengths"])
    masses = _pieces(row["masses"], row["lengths"])
    fits = (
        len(row["parts"]) == max(len(row["ids"]) - 1, 0)
        and all(0 <= i < vocabulary for i in row["ids"])
        and all(0 <= s < len(sets) for s in row["source"])
    )
    if not fits or parts is None or rests is None or lengths is None:
        return False
    if outcomes is None or masses is None:
        return False
    of_part = [sum(piece) + rest for piece, rest in zip(masses, row["rest"], strict=True)]
    wholes = _pieces(of_part, row["parts"])
    return wholes is not None and (
        all(a < b for piece in parts for a, b in pairwise(piece))
        and all(o < len(sets[s]) for s, p in zip(row["source"], outcomes, strict=True) for o in p)
        and all(_apart(p, sets[s]) for s, p in zip(row["source"], outcomes, strict=True))
        and all(m >= 0 and math.isfinite(m) for m in (*row["masses"], *row["rest"]))
        and all(abs(sum(piece) - 1) <= 1e-4 for piece in wholes if piece)
    )


def _sets(row: dict[str, Any]) -> bool:
    starts, stops, ids = row["starts"], row["stops"], row["ids"]
    return (
        len(starts) == len(stops)
        and all(0 <= a <= b <= len(ids) for a, b in zip(starts, stops, strict=True))
        and sorted(ids) == list(range(len(ids)))
    )


def _apart(numbers: list[int], sets: OutcomeSets) -> bool:
    ids = [id_ for number in numbers for id_ in sets[number].tolist()]
    return len(set(ids)) == len(ids)


def _corpus(row: dict[str, Any]) -> bool:
    spans, length = row["context"], len(row["text"].encode())
    return len(spans) % 2 == 0 and sorted(spans) == spans and all(s <= length for s in spans)


def _nats(row: dict[str, Any]) -> bool:
    return all(math.isnan(x) or x >= -1e-3 for x in row["nats"])


# What changes them.


def changed_values(columns: Columns, chance: random.Random) -> str:
    """Change one value, or the bounds of one row; says what."""
    name = chance.choice(sorted(columns))
    column = columns[name]
    if not isinstance(column, Ragged):
        row = chance.randrange(len(column))
        column[row] = _other(column[row], column.dtype, chance)
        return f"{name}[{row}] = {column[row]!r}"
    how = chance.choice(["value", "value", "value", "swap", "bound", "less", "more"])
    offsets, values = column.offsets, column.values
    at = chance.randrange(max(len(values), 1))
    row = min(int(np.searchsorted(offsets, at, side="right")) - 1, len(offsets) - 2)
    if how == "bound" or len(values) == 0:
        inner = chance.randrange(len(offsets))
        low, high = offsets[max(inner - 1, 0)], offsets[min(inner + 1, len(offsets) - 1)]
        if 0 < inner < len(offsets) - 1:
            offsets[inner] = chance.randint(low, high)
    elif how == "value":
        values[at] = _other(values[at], values.dtype, chance)
    elif how == "swap":
        other = chance.randrange(len(values))
        values[[at, other]] = values[[other, at]]
    else:
        offsets[row + 1 :] += 1 if how == "more" else -1
        found = np.insert(values, at, values[at]) if how == "more" else np.delete(values, at)
        columns[name] = Ragged(offsets, found)
    return f"{how} of {name}, entry {at}"


def _other(value: Any, kind: np.dtype[Any], chance: random.Random) -> Any:
    if kind.kind == "b":
        return not value
    if kind.kind == "f":
        step = kind.type(chance.choice([1e-6, 0.3]))
        return chance.choice([np.nan, np.inf, -1.0, 0.0, 2.0, value + step])
    if kind.kind == "O":
        return chance.choice(["", "another", value + "é"])
    bounds = np.iinfo(kind)
    found = chance.choice(
        [0, 1, bounds.max, bounds.min, int(value) + 1, int(value) - 1, chance.randrange(70_000)]
    )
    return min(max(found, bounds.min), bounds.max)


def _table(columns: Columns, schema: pa.Schema) -> pa.Table:
    arrays = []
    for field in schema:
        column = columns[field.name]
        if isinstance(column, Ragged):
            values = pa.array(column.values, type=field.type.value_type)
            offsets = pa.array(column.offsets.astype(np.int32))
            arrays.append(pa.ListArray.from_arrays(offsets, values, type=field.type))
        else:
            arrays.append(pa.array(column, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _written(
    table: pa.Table, rows: int = BATCH_BLOCKS, codec: str | None = "zstd"
) -> tuple[bytes, list[int]]:
    """(a file, where its segments end)."""
    sink = pa.BufferOutputStream()
    cuts = [8 + table.schema.serialize().size]
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(sink, table.schema, options=options) as out:
        for batch in table.to_batches(max_chunksize=rows):
            out.write_batch(batch)
            cuts.append(sink.tell())
    return sink.getvalue().to_pybytes(), cuts


def _with_null(table: pa.Table, chance: random.Random) -> pa.Table:
    """A table that says it has no nulls, and has one."""
    at = chance.randrange(table.num_columns)
    field, column = table.schema.field(at), table.column(at).combine_chunks()
    is_list = pa.types.is_list(field.type)
    flat = column.values if is_list else column
    values = flat.to_pylist()
    values[chance.randrange(len(values))] = None
    array = pa.array(values, type=flat.type)
    if is_list:
        array = pa.ListArray.from_arrays(column.offsets, array, type=field.type)
    return table.set_column(at, field, array)


def _other_columns(table: pa.Table, chance: random.Random) -> pa.Table:
    at = chance.randrange(table.num_columns)
    name = table.schema.field(at).name
    how = chance.choice(["gone", "renamed", "twice", "moved", "text"])
    if how == "gone":
        return table.remove_column(at)
    if how == "renamed":
        names = [f"{n}_" if n == name else n for n in table.schema.names]
        return table.rename_columns(names)
    if how == "twice":
        return table.append_column(name, table.column(at))
    if how == "moved":
        return table.select([*reversed(table.schema.names)])
    return table.set_column(at, name, pa.array(["x"] * table.num_rows))


def mutate_shard(kind: str, place: Path, chance: random.Random) -> tuple[str, bool | None, Columns]:
    """Change a shard of a folder.

    Returns:
        (what was done, whether it is legal data; None where only what is read can tell, what the
        columns are then)
    """
    name, folder = name_of(kind), StageFolder(place)
    columns, schema = columns_of(place, name)
    how = chance.choice(["values"] * 12 + ["bytes"] * 4 + ["null", "columns", "batches", "rows"])
    if how == "values":
        what = " and ".join(
            changed_values(columns, chance) for _ in range(chance.choice([1, 1, 1, 2]))
        )
        rewrite(place, name, *_written(_table(columns, schema)))
        return what, legal(kind, columns, folder), columns
    table = _table(columns, schema)
    if how == "bytes":
        codec = chance.choice(["zstd", None])
        data, cuts = _written(table, codec=codec)
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 3])):
            at = chance.randrange(len(data))
            changed[at] = chance.choice([0, 255, changed[at] ^ (1 << chance.randrange(8))])
        rewrite(place, name, bytes(changed), cuts)
        return f"bytes of the file ({codec})", None, columns
    if how == "null":
        rewrite(place, name, *_written(_with_null(table, chance)))
    elif how == "columns":
        table = _other_columns(table, chance)
        rewrite(place, name, *_written(table))
        if any(table.schema.equals(schema) for schema in layout_of(kind, folder).schemas):
            return how, None, columns  # a corpus need not have context
    elif how == "batches" and table.num_rows > 1:
        sizes = [size for size in (1, 7, 63) if size < table.num_rows]
        rewrite(place, name, *_written(table, chance.choice(sizes)))
    else:
        rewrite(place, name, *_written(table.slice(1)))
    return how, False, columns


def outcome_of_shard(kind: str, place: Path, chance: random.Random) -> str:
    """Mutate a shard and read it; gives "refused" or "legal".

    Raises:
        AssertionError: it ended otherwise.
    """
    what, is_legal, columns = mutate_shard(kind, place, chance)
    what = f"{kind}: {what}"
    folder, name = StageFolder(place), name_of(kind)
    try:
        shard = Shard(folder, name, layout_of(kind, folder))
        read = list(shard.batches())
        found = {key: _joined([batch[key] for batch in read]) for key in read[0]}
        if kind in ("sampled", "top"):
            for batch in read:
                _use(batch)
            list(open_store(place))
    except StoreError as error:
        _check_refusal(place / name, what, is_legal, error)
        return "refused"
    assert is_legal is not False, f"{what} breaks a rule, and was read in silence"
    assert legal(kind, found, folder), f"{what} breaks a rule, and was read in silence"
    if is_legal:
        for key, column in columns.items():
            _assert_equal(found[key], column, f"{what}: {key}")
        # Fewer outcomes of a source are legal in themselves, and not those of what was fused.
        found = [fault for fault in verify_stage(place).faults if fault.file == name]
        assert not found, what
    return "legal"


def _check_refusal(path: Path, what: str, is_legal: bool | None, error: StoreError) -> None:
    assert str(path) in str(error), f"{what}: {error}"
    assert is_legal is not True, f"{what} is legal data, and was refused: {error}"
    assert verify_stage(path.parent).faults, f"{what}: verify finds nothing"


def _joined(parts: list[Any]) -> Any:
    if not isinstance(parts[0], Ragged):
        return np.concatenate(parts)
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return Ragged(offsets_of(lengths), np.concatenate([part.values for part in parts]))


def _assert_equal(mine: Any, theirs: Any, what: str) -> None:
    if isinstance(mine, Ragged):
        np.testing.assert_array_equal(np.diff(mine.offsets), np.diff(theirs.offsets), what)
        mine, theirs = mine.values, theirs.values
    np.testing.assert_array_equal(mine, theirs, what)


class _Target:
    """As much of a tokenizer as a map between equal ones takes."""

    vocabulary = range(VOCABULARY)


_SAME: VocabularyMap = map_translation(np.arange(VOCABULARY), _Target())


class _Pieces:
    """As much of `Continuations` as healing takes: each longer token begins with each shorter."""

    offsets = offsets_of(np.arange(VOCABULARY) % 3 + 1)
    spelled = np.zeros(offsets[-1], dtype=np.uint8)

    def __getitem__(self, slots: np.ndarray) -> np.ndarray:
        return np.asarray(slots % VOCABULARY)


def _use(batch: dict[str, Any]) -> None:
    """What `fuse` does with a record batch, in loops that check no index."""
    tokens, kept = tokens_of(batch), kept_of(batch)
    rows = np.arange(len(kept.tail))
    healed = heal(tokens, kept, _Pieces())
    sums = np.add.reduceat(np.append(healed.masses, 0.0), healed.offsets[:-1])
    np.testing.assert_allclose(sums + healed.tail, 1.0, atol=1e-3)
    carry(kept.distributions(), rows, _SAME, False)
    map_counts(kept.distributions(), rows, _SAME)
    sizes = np.add.reduceat(np.append(batch["bytes"].values, 0), batch["bytes"].offsets[:-1])
    sizes = np.where(np.diff(batch["bytes"].offsets) > 0, sizes, 0)
    nats_by_byte(tokens.ends, tokens.offsets, kept.true_log_prob, offsets_of(sizes))


# Manifests.

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**70, 1.5, "", "x", "../x", [], [1], {}, {"x": 1}, [[[1, 2], 3]],
)  # fmt: skip


def mutate_manifest(place: Path, chance: random.Random) -> str:
    """Change, add or remove something in a manifest, with a checksum that is right."""
    whole = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    del whole["checksum"]
    original = copy.deepcopy(whole)
    node: Any = whole
    path: list[Any] = []
    while isinstance(node, dict | list) and node and (not path or chance.random() < 0.8):
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parent, node = node, node[key]
        path.append(key)
    how = chance.choice(["value", "value", "gone", "renamed", "deep"])
    if how == "gone" or (how == "renamed" and isinstance(parent, list)):
        del parent[path[-1]]
    elif how == "renamed":
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = chance.choice(_VALUES) if how == "value" else "DEEP"
    text = json.dumps(whole)[:-1].replace('"DEEP"', "[" * 3000 + "]" * 3000)
    body = text.encode()
    checksum = f',\n"checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'
    replace(place / MANIFEST, body + checksum.encode())
    return f"{how} of {path}{' (nothing)' if whole == original else ''}"


def outcome_of_manifest(place: Path, chance: random.Random, blocks: dict[int, Any]) -> str:
    """Mutate a manifest and read the store; gives "refused" or "legal".

    Args:
        blocks: of the store as it was. What is given out is equal, whatever the manifest says.
    """
    what = mutate_manifest(place, chance)
    verify_stage(place)
    try:
        store = open_store(place)
        for block in store:
            before = blocks[block.number]
            assert np.array_equal(block.ids, before.ids), what
            assert np.array_equal(block.ends, before.ends), what
            for name in ("offsets", "ids", "log_probs", "counts", "tail", "true_log_prob"):
                mine, theirs = getattr(block.kept, name), getattr(before.kept, name)
                assert np.array_equal(mine, theirs), what
        store.bytes_per_token()
    except StoreError:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return "legal"


# Kept maps.


def outcome_of_map(chance: random.Random, path: Path, made: VocabularyMap) -> str:
    """Put a changed map in a kept one's place and ask for it: it is legal, or is made anew."""
    arrays = {
        "outcome_of_source": made.outcome_of_source.copy(),
        "outcome_of_target": made.outcome_of_target.copy(),
        "outcomes": np.array(made.outcomes),
        "complete": np.array(made.complete),
    }
    name = chance.choice(sorted(arrays))
    how = chance.choice(["value", "value", "kind", "size", "gone", "bytes"])
    if how == "value":
        values = [-(2**63), -2, -1, 0, 1, made.outcomes, 2**40]
        if name == "complete":
            arrays[name] = np.array(not made.complete)
        elif name == "outcomes":
            arrays[name] = np.array(chance.choice(values))
        else:
            arrays[name][chance.randrange(len(arrays[name]))] = chance.choice(values)
    elif how == "kind":
        arrays[name] = arrays[name].astype(chance.choice([np.int32, np.float64, np.uint64]))
    elif how == "size":
        arrays[name] = np.resize(arrays[name], chance.choice([(0,), (3,), (2, 2)]))
    elif how == "gone":
        del arrays[name]
    data = bytearray(save(arrays))
    if how == "bytes":
        data[chance.randrange(len(data))] = chance.randrange(256)
    replace(path, bytes(data))
    sizes = len(made.outcome_of_source), len(made.outcome_of_target)
    anew: list[int] = []

    def make() -> VocabularyMap:
        anew.append(1)
        return made

    found = cached_translation("partition", "a" * 24, "b" * 24, sizes, make)
    what = f"{how} of {name}"
    for array, size in zip((found.outcome_of_source, found.outcome_of_target), sizes, strict=True):
        assert (array.dtype, array.shape) == (np.int64, (size,)), what
        assert array.min() >= -1, what
        assert array.max() < found.outcomes, what
    if not anew and how == "value":
        assert np.array_equal(found.outcome_of_source, arrays["outcome_of_source"]), what
        assert np.array_equal(found.outcome_of_target, arrays["outcome_of_target"]), what
    assert anew or how in ("value", "bytes"), what
    return "refused" if anew else "legal"


def many(root: Path, seeds: range) -> dict[str, int]:
    """The shards of these seeds; for a process of its own, which may be ended by what it reads."""
    ends: dict[str, int] = {}
    for seed in seeds:
        chance = random.Random(f"shard {seed}")
        kind = KINDS[seed % len(KINDS)]
        place = root / f"{kind}-{seed}"
        shutil.copytree(root / kind, place)
        try:
            end = outcome_of_shard(kind, place, chance)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}: {error!r}") from error
        finally:
            shutil.rmtree(place)
        ends[end] = ends.get(end, 0) + 1
    return ends


if __name__ == "__main__":
    print(json.dumps(many(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])))))
