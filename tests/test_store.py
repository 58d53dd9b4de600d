"""Stores: the codec, checksums, opening them from programs, and `fusellm store`."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import fusellm
from fusellm.arrays.distributions import Kept
from fusellm.arrays.tokens import Tokens
from fusellm.config import ObjectiveSettings
from fusellm.config.base import SettingsBlock
from fusellm.errors import StoreError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import BLOCKS_SCHEMA
from fusellm.store.externalized import (
    kept_of,
    source_layout,
    source_schema,
    tokens_of,
    tokens_schema,
)
from fusellm.store.fused import fused_schema
from fusellm.store.identity import Identity
from fusellm.store.layout import Layout
from fusellm.store.manifest import FORMAT, MANIFEST, StageFolder, segments_of
from fusellm.store.opened import DistributionStore, StoredBlock, open_store
from fusellm.store.quantized import ERROR_NATS, STEP_NATS
from fusellm.store.tables import Shard, encode_table, shard_names, write_encoded
from fusellm.store.verify import repair, stage_paths, verify_stage
from fusellm.store.writer import StageWriter
from stores import (
    IDENTITY,
    Made,
    drawn,
    flip,
    kept_of_rows,
    middle_of,
    replace,
    some,
    top,
    write_store,
)

DOC = Path(__file__).resolve().parents[1] / "docs" / "store-format.md"
FLOAT32 = float(np.finfo(np.float32).eps)


# What is written


_LOGITS = st.one_of(
    st.lists(st.floats(-1000, 0, width=32), min_size=1, max_size=9).map(np.array),
    st.tuples(st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 4.0, 90.0])).map(
        lambda seed: np.random.default_rng(seed[0]).normal(0, seed[1], 300)
    ),
)


@st.composite
def blocks_of(draw: st.DrawFn, sampled: bool) -> Made:
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    k = draw(st.sampled_from([1, 2, 10, 300]))
    mass = draw(st.sampled_from([None, 0.5, 0.99]))
    blocks, rows = [], []
    for lengths in draw(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6)):
        usable = draw(st.integers(0, 5)) > 0
        ids = chance.integers(0, 60_000, len(lengths)).tolist()
        blocks.append((usable, ids, np.cumsum(lengths, dtype=np.int64).tolist()))
        for _ in range(len(ids) - 1 if usable else 0):
            if sampled:
                kinds = draw(st.integers(1, 4))
                counts = (chance.multinomial(63 - kinds, [1 / kinds] * kinds) + 1).tolist()
                rows.append(drawn(counts, chance, draw(st.floats(-1000, 0, width=32))))
            else:
                rows.append(top(draw(_LOGITS), k, mass, chance))
    return Made(blocks, kept_of_rows(rows))


def round_trip(made: Made, sampled: bool) -> tuple[Tokens, Kept]:
    """(tokens, distributions) as they are read from a file."""
    layout = source_layout(60_000, "sampled" if sampled else "top", 63 if sampled else 300)
    columns = written_and_read(made.columns(sampled), layout)
    return tokens_of(columns), kept_of(columns)


def written_and_read(columns: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Columns as they come back from a file of one record batch, checked."""
    with (
        tempfile.TemporaryDirectory() as place,
        StageWriter.open(Path(place) / "s", IDENTITY) as folder,
    ):
        write_encoded(folder, "a.arrow", encode_table(columns, layout.schemas[0]))
        (found,) = Shard(folder, "a.arrow", layout).batches()
    return found


def check_tokens(made: Made, tokens: Tokens) -> None:
    for row, (usable, ids, ends) in enumerate(made.blocks):
        mine = slice(tokens.offsets[row], tokens.offsets[row + 1])
        assert tokens.ids[mine].tolist() == (ids if usable else [])
        assert tokens.ends[mine].tolist() == (ends if usable else [])


@given(blocks_of(sampled=True))
@settings(max_examples=60, deadline=None)
def test_tokens_and_draws_come_back_as_they_were(made: Made) -> None:
    tokens, kept = round_trip(made, sampled=True)
    check_tokens(made, tokens)
    assert np.array_equal(kept.offsets, made.kept.offsets)
    assert np.array_equal(kept.ids, made.kept.ids)
    assert np.array_equal(kept.counts, made.kept.counts)
    assert np.abs(kept.true_log_prob - made.kept.true_log_prob).max(initial=0) <= STEP_NATS / 2
    if len(kept.tail):
        whole = np.add.reduceat(kept.masses(), kept.offsets[:-1])
        np.testing.assert_allclose(whole, 1.0, atol=1e-12)


@given(blocks_of(sampled=False))
@settings(max_examples=100, deadline=None)
def test_log_probabilities_come_back_within_the_stated_error(made: Made) -> None:
    tokens, kept = round_trip(made, sampled=False)
    check_tokens(made, tokens)
    assert np.array_equal(kept.offsets, made.kept.offsets)
    assert np.array_equal(kept.ids, made.kept.ids)
    written, read = (x.log_probs.astype(np.float64) for x in (made.kept, kept))
    # float32 on both sides: of the log-probabilities, and of what the written ones sum to.
    slack = 2e-6 + FLOAT32 * np.abs(written)
    assert (np.abs(read - written) <= ERROR_NATS + slack).all()
    tails, found = (x.tail.astype(np.float64) for x in (made.kept, kept))
    assert np.array_equal(tails == 0, found == 0)
    there = tails > 0
    assert (np.abs(np.log(found[there] / tails[there])) <= ERROR_NATS + 2e-6).all()
    assert np.abs(kept.true_log_prob - made.kept.true_log_prob).max(initial=0) <= STEP_NATS / 2
    if len(kept.tail):
        whole = np.add.reduceat(kept.masses(), kept.offsets[:-1]) + kept.tail
        np.testing.assert_allclose(whole, 1.0, atol=1e-6)


@given(blocks_of(sampled=False), st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_a_block_is_the_same_to_the_last_bit_however_it_is_asked_for(made: Made, n: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "s"
        write_store(folder, [made], sampled=False, k=300, vocabulary=60_000)
        one, store = open_store(folder), open_store(folder)
        number = n % len(one)
        assert_same(one[number], list(store)[number])


def test_steps_of_the_worst_case() -> None:
    """Rounding errors that all go one way are where the bound is reached."""
    down = np.log(1 / 8) + np.array([0.49, 0.5, 0.51]) * STEP_NATS
    kept = kept_of_rows(
        [
            {"ids": range(9), "log_probs": [*[at] * 8, -1000.0 - STEP_NATS / 2], "counts": []}
            | {"tail": 0.0, "true": -1000.0}
            for at in down
        ]
    )
    made = Made([(True, [1, 2, 3, 4], [1, 2, 3, 4])], kept)
    _, found = round_trip(made, sampled=False)
    whole = np.add.reduceat(kept.masses(), kept.offsets[:-1])
    written = kept.log_probs - np.repeat(np.log(whole), 9)
    assert np.abs(found.log_probs - written).max() <= ERROR_NATS + 1000 * FLOAT32


def test_types_follow_vocabulary_and_k() -> None:
    def types(vocabulary: int, scheme: str, most: int) -> dict[str, str]:
        return {f.name: str(f.type) for f in source_schema(vocabulary, scheme, most)}

    assert "uint16" in types(65_536, "top", 255)["ids"]
    assert "uint32" in types(65_537, "top", 255)["kept_ids"]
    assert "uint8" in types(99, "top", 255)["kept"]
    assert "uint16" in types(99, "top", 256)["kept"]
    made = Made(
        [(True, [70_000, 5], [3, 9])],
        kept_of_rows([top(np.zeros(300), 300, None, np.random.default_rng(0))]),
    )
    made.kept.ids[7] = 65_540
    columns = written_and_read(made.columns(False), source_layout(70_001, "top", 300))
    assert columns["ids"].values.tolist() == [70_000, 5]
    assert kept_of(columns).ids[7] == 65_540
    assert np.diff(kept_of(columns).offsets).tolist() == [300]


# Stores made without a model


@pytest.fixture(params=[True, False], ids=["sampled", "top"])
def made_store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three shards of 200, 200 and 70 blocks."""
    sampled = bool(request.param)
    shards = [some(200, sampled, 1), some(200, sampled, 2), some(70, sampled, 3)]
    write_store(tmp_path / "made", shards, sampled)
    return tmp_path / "made"


def assert_same(mine: StoredBlock, theirs: StoredBlock) -> None:
    assert (mine.number, mine.usable, mine.reason) == (theirs.number, theirs.usable, theirs.reason)
    assert np.array_equal(mine.ids, theirs.ids)
    assert np.array_equal(mine.ends, theirs.ends)
    for name in ("offsets", "ids", "log_probs", "counts", "tail", "true_log_prob"):
        assert np.array_equal(getattr(mine.kept, name), getattr(theirs.kept, name)), name


def test_segments_are_head_record_batches_and_foot(made_store: Path) -> None:
    folder = StageFolder(made_store)
    for name in shard_names(folder):
        segments, path = folder.segments(name), made_store / name
        assert sum(segment.length for segment in segments) == path.stat().st_size
        reader = pyarrow.ipc.open_file(str(path))
        assert len(segments) == reader.num_record_batches + 2
        data = path.read_bytes()
        assert data[: segments[0].length] == b"ARROW1\0\0" + reader.schema.serialize().to_pybytes()
        cuts = np.cumsum([segment.length for segment in segments])[:-1].tolist()
        assert segments_of(data, cuts) == segments
        assert data[cuts[0] : cuts[0] + 4] == b"\xff\xff\xff\xff"  # where a record batch begins


def test_blocks_one_by_one_and_in_order(made_store: Path) -> None:
    store = fusellm.open_store(str(made_store))
    sampled = store.facts.scheme == "sampled"
    shards = [some(200, sampled, 1), some(200, sampled, 2), some(70, sampled, 3)]
    written = [block for made in shards for block in made.blocks]
    tails = np.concatenate([made.kept.tail for made in shards])
    found = list(store)
    assert len(store) == len(found) == len(written) == 470
    assert [block.number for block in found] == list(range(470))
    assert sum(block.positions for block in found) == store.facts.positions == len(tails)
    assert sum(len(block.kept.ids) for block in found) == store.facts.kept
    assert sum(len(block.ids) for block in found) == store.facts.tokens
    for block, (usable, ids, ends) in zip(found, written, strict=True):
        assert (block.usable, block.ids.tolist()) == (usable, ids)
        assert block.ends.tolist() == (ends if usable else [])
        assert block.reason == (None if usable else "its tokenizer changes the text")
        assert block.positions == (len(ids) - 1 if usable else 0)
        assert block.kept.offsets[0] == 0
    assert {aside.block for aside in store.facts.aside} == {b.number for b in found if b.reason}
    for number in (469, 0, 63, 64, 199, 200, 263, 264, 5):
        assert_same(store[number], found[number])
    for number in (-1, 470):
        with pytest.raises(StoreError, match=f"there is no block {number}: .* has 0 to 469"):
            store[number]


def test_a_position_is_what_the_arrays_say(made_store: Path) -> None:
    store = open_store(made_store)
    for block in store:
        masses = block.kept.masses()
        for n in range(block.positions):
            at = block.at(n)
            mine = slice(block.kept.offsets[n], block.kept.offsets[n + 1])
            np.testing.assert_allclose(at.masses, masses[mine], rtol=1e-12)
            np.testing.assert_allclose(np.exp(at.log_probs), at.masses, rtol=1e-5)
            assert at.masses.sum() + at.tail == pytest.approx(1, abs=1e-6)
            assert (at.true_id, at.token) == (block.ids[n + 1], block.ids[n])
            assert at.read_bytes == block.ends[n]
    with pytest.raises(StoreError, match=r"there is no position 0: block 4 has 0 \(its tokenizer"):
        store[4].at(0)
    with pytest.raises(StoreError, match="there is no position -1"):
        store[0].at(-1)


def test_a_block_can_be_changed_without_changing_the_store(made_store: Path) -> None:
    store = open_store(made_store)
    usable = next(block for block in store if block.positions)
    usable.ids[:] = 0
    usable.kept.tail[:] = 9
    assert store[usable.number].ids.any()
    assert (store[usable.number].kept.tail <= 1).all()


def test_a_store_needs_nothing_outside_of_its_folder(made_store: Path, tmp_path: Path) -> None:
    before = list(open_store(made_store))
    elsewhere = tmp_path / "elsewhere" / "renamed"
    elsewhere.parent.mkdir()
    shutil.move(made_store, elsewhere)
    moved = open_store(elsewhere)
    for mine, theirs in zip(before, moved, strict=True):
        assert_same(mine, theirs)
    assert moved.facts.identity == IDENTITY
    assert verify_stage(elsewhere).faults == ()


def test_memory_is_that_of_a_record_batch(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [some(640, False, n, 40) for n in range(3)], sampled=False)
    store = open_store(tmp_path / "s")
    for _ in store:
        pass
    tracemalloc.start()
    try:
        whole = list(store)
        everything = tracemalloc.get_traced_memory()[1]
        del whole
        tracemalloc.reset_peak()
        for _ in store:
            pass
        at_once = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert at_once < everything / 5


def test_an_unfinished_store_gives_what_is_finished(tmp_path: Path) -> None:
    made = some(70, True, 4)
    write_store(tmp_path / "s", [made, None, made], sampled=True, finish=False)
    store = open_store(tmp_path / "s")
    assert not store.facts.complete
    assert "unfinished" in repr(store)
    assert [(run.start, run.stop) for run in store.numbers] == [(0, 70), (270, 340)]
    assert [block.number for block in store] == [*range(70), *range(270, 340)]
    assert len(store) == 140
    assert store[300].ids.tolist() == made.blocks[30][1]
    with pytest.raises(StoreError, match=r"no block 100: .* has 0 to 69, 270 to 339 so far"):
        store[100]


def test_what_is_no_distribution_store_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_store(run / "externalize" / "made", [some(5, True)], sampled=True)
    for stage in ("corpus", "externalize/target", "fuse", "train/fused", "evaluate", "else"):
        with StageWriter.open(run / stage, Identity(stage, {}, {})):
            pass
    with StageWriter.open(run / "externalize" / "begun", Identity("externalize/begun", {}, {})):
        pass
    (run / "model").mkdir()
    (run / "model" / "config.json").touch()
    (run / "nothing").mkdir()
    (run / "file").touch()
    place = re.escape(str(run / "externalize" / "made"))
    cases = {
        "corpus": f"a run's corpus; a source's distributions are in .*{place}",
        "externalize/target": f"the target's tokens, without distributions; .*{place}",
        "fuse": f"a run's fused distributions; .*{place}",
        "train/fused": f"a trained model; .*{place}",
        "evaluate": f"a run's measurements; .*{place}",
        "else": "holds the stage 'else'",
        "externalize/begun": "has begun and nothing has been read yet",
        "externalize": f"holds several stages; its distributions are in .*{place}",
        "": f"holds several stages; its distributions are in .*{place}",
        "model": "is a model, not its distributions",
        "nothing": "is not a distribution store: it has no manifest.json",
        "file": "is a file; give the folder",
        "gone": "there is no folder",
    }
    for name, message in cases.items():
        with pytest.raises(StoreError, match=message):
            open_store(run / name)


def signed(text: str) -> bytes:
    """A manifest with a fitting checksum."""
    body = text.encode()
    return body + f',\n"checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def test_another_format_is_refused_by_both_versions(made_store: Path) -> None:
    path = made_store / MANIFEST
    body = path.read_text().split(',\n"checksum"')[0]
    for newer in (
        signed(body.replace(f'"format": {FORMAT}', '"format": 7')),
        b'{"format": 7, "of": "another shape"}',
        b'{"format": 7, "software": "9.9"}',
    ):
        path.write_bytes(newer)
        message = f"has format 7, written by fusellm .*, and this fusellm reads format {FORMAT}; "
        with pytest.raises(StoreError, match=message + "install a newer"):
            open_store(made_store)
        (fault,) = verify_stage(made_store).faults
        assert "has format 7" in fault.what
    path.write_bytes(signed(body.replace(f'"format": {FORMAT}', '"format": 0')))
    with pytest.raises(StoreError, match=r"has format 0.*make it anew"):
        open_store(made_store)


def test_a_manifest_cannot_name_files_outside_of_its_folder(made_store: Path) -> None:
    path = made_store / MANIFEST
    body = path.read_text().split(',\n"checksum"')[0]
    for name in ("../mine.arrow", "/etc/hostname", "..", ""):
        path.write_bytes(signed(body.replace("train-00001.arrow", name)))
        with pytest.raises(StoreError, match="names a file outside of its folder"):
            open_store(made_store)


# Damage


def test_a_record_batch_is_verified_when_it_is_first_read(made_store: Path) -> None:
    name = "train-00000.arrow"
    before = list(open_store(made_store))
    flip(made_store / name, middle_of(StageFolder(made_store), name, 3))  # record batch 2
    store = open_store(made_store)
    for number in (0, 63, 64, 127, 192):  # record batches 0, 1 and 3
        assert_same(store[number], before[number])
    with pytest.raises(StoreError, match=rf"{name} is damaged \(the checksum of record batch 2"):
        store[128]
    given = []
    with pytest.raises(StoreError, match="record batch 2 differs"):
        given.extend(store)
    with pytest.raises(StoreError, match="record batch 2 differs"):  # and not only at first
        store[191]
    assert_same(store[300], before[300])
    (fault,) = verify_stage(made_store).faults
    assert (fault.file, fault.record_batches) == (name, (2,))


@pytest.mark.parametrize("segment", [0, -1])
def test_the_frame_is_verified_when_a_shard_is_opened(made_store: Path, segment: int) -> None:
    name = "train-00001.arrow"
    folder = StageFolder(made_store)
    flip(made_store / name, middle_of(folder, name, segment % len(folder.segments(name))))
    store = open_store(made_store)
    assert store[199].number == 199
    for number in (200, 399):
        with pytest.raises(StoreError, match="the checksum of its frame differs"):
            store[number]


def detected(path: Path, before: Sequence[StoredBlock]) -> bool:
    """Whether reading all of a store fails, with nothing wrong given out before."""
    given = 0
    try:
        for mine, theirs in zip(open_store(path), before, strict=True):
            assert_same(mine, theirs)
            given += 1
    except StoreError:
        return given < len(before)
    return False


def corruptions(
    path: Path, count: int, seed: int
) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """(file, change) of changes of one byte, of every file alike often."""
    chance = random.Random(seed)
    files = sorted(file.name for file in path.iterdir())
    for n in range(count):
        name = files[n % len(files)]
        offset = chance.randrange((path / name).stat().st_size)
        by = chance.randrange(1, 256)

        def change(data: bytes, at: int = offset, by: int = by) -> bytes:
            return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]

        yield name, change


def count_detected(path: Path, count: int, seed: int) -> int:
    before = list(open_store(path))
    found = 0
    for name, change in corruptions(path, count, seed):
        data = (path / name).read_bytes()
        replace(path / name, change(data))
        found += detected(path, before) and bool(verify_stage(path).faults)
        replace(path / name, data)
    assert not verify_stage(path).faults
    return found


def test_every_changed_byte_is_detected(made_store: Path) -> None:
    assert count_detected(made_store, 30, 0) == 30  # and as many in the other scheme


@pytest.mark.faults
def test_a_thousand_changed_bytes_are_detected(made_store: Path) -> None:
    found = count_detected(made_store, 500, 1)  # and as many in the other scheme
    print(f"{found} of 500 changed bytes detected")
    assert found == 500


def test_files_cut_short_and_too_long_are_detected(made_store: Path) -> None:
    before = list(open_store(made_store))
    for path in sorted(made_store.iterdir()):
        data = path.read_bytes()
        for other in (b"", data[:1], data[:-1], data[: len(data) // 2], data + b"\0", data + data):
            replace(path, other)
            assert detected(made_store, before), path
            assert verify_stage(made_store).faults
        path.unlink()
        with pytest.raises(StoreError, match=r"is missing|has no manifest"):
            list(open_store(made_store))
        assert verify_stage(made_store).faults
        path.write_bytes(data)


def test_verify_names_what_is_wrong_and_repair_takes_it_out(made_store: Path) -> None:
    names = shard_names(StageFolder(made_store))
    assert verify_stage(made_store).faults == ()
    flip(made_store / names[0], 3)
    flip(made_store / names[0], middle_of(StageFolder(made_store), names[0], 1))
    replace(made_store / names[1], (made_store / names[1]).read_bytes()[:-7])
    (made_store / names[2]).unlink()
    found = verify_stage(made_store)
    assert [fault.file for fault in found.faults] == names
    assert found.faults[0].what == "damaged: record batch 0, what frames the record batches"
    assert found.faults[1].what.startswith("cut short: ")
    assert found.faults[2].what == "missing"
    assert repair(found) == names
    assert (found.complete, StageFolder(made_store).complete) == (True, False)
    assert verify_stage(made_store).faults == ()
    assert [path.name for path in made_store.iterdir()] == [MANIFEST]
    assert len(open_store(made_store)) == 0


def test_repair_leaves_what_has_been_made_anew_meanwhile(made_store: Path) -> None:
    name = shard_names(StageFolder(made_store))[0]
    data = (made_store / name).read_bytes()
    flip(made_store / name, 500)
    found = verify_stage(made_store)
    replace(made_store / name, data)
    assert repair(found) == []
    assert StageFolder(made_store).complete


def test_repair_waits_for_nobody(made_store: Path) -> None:
    flip(made_store / "train-00000.arrow", 500)
    found = verify_stage(made_store)
    with StageWriter.open(made_store, IDENTITY), pytest.raises(StoreError, match="another process"):
        repair(found)


def test_an_unfinished_folder_forgets_what_is_missing_or_of_another_size(tmp_path: Path) -> None:
    shards = [some(70, True, n) for n in range(4)]
    write_store(tmp_path / "s", shards, sampled=True, finish=False)
    (tmp_path / "s" / "train-00001.arrow").unlink()
    replace(tmp_path / "s" / "train-00002.arrow", b"short")
    with StageWriter.open(tmp_path / "s", IDENTITY) as folder:
        assert list(folder.shards) == ["train-00000.arrow", "train-00003.arrow"]
    assert not (tmp_path / "s" / "train-00002.arrow").exists()


def test_a_repaired_run_is_made_anew_where_it_was_damaged(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages = ["corpus", "externalize", "fuse"]
    recipe = resolve_paths(load_recipe(world / "recipe.yaml"), world)
    Pipeline(recipe, run, Silent()).execute(stages)
    before = {path: path.read_bytes() for path in run.rglob("*.arrow")}
    manifests = {path: told(path) for path in run.rglob(MANIFEST)}
    first = run / "externalize" / "first"
    flip(first / "train-00002.arrow", 2000)
    (first / "train-00000.arrow").unlink()
    flip(run / "fuse" / "train-00001.arrow", 2000)
    flip(run / "corpus" / "train-00003.arrow", 2000)
    found = [verify_stage(folder) for folder in stage_paths(run)]
    assert [len(stage.faults) for stage in found] == [1, 2, 0, 0, 1]
    assert [repair(stage) for stage in found if stage.faults] == [
        ["train-00003.arrow"],
        ["train-00000.arrow", "train-00002.arrow"],
        ["train-00001.arrow"],
    ]
    untouched = {p: p.stat().st_mtime_ns for p in run.rglob("*.arrow")}
    assert len(untouched) == len(before) - 4
    Pipeline(recipe, run, Silent()).execute(stages)
    anew = {path for path in run.rglob("*.arrow") if untouched.get(path) != path.stat().st_mtime_ns}
    sets = {path for path in anew if path.name.startswith("outcomes-")}
    corpus = {path for path in anew if path.parent.name == "corpus"}  # it is begun anew as a whole
    assert len(anew - sets - corpus) == 3
    assert {path: path.read_bytes() for path in run.rglob("*.arrow")} == before
    assert {path: told(path) for path in run.rglob(MANIFEST)} == manifests


def told(path: Path) -> dict[str, Any]:
    """A manifest without what differs from one run to the next."""
    found = json.loads(path.read_text(encoding="utf-8"))
    del found["seconds"], found["checksum"]
    return dict(found)


# docs/store-format.md


def documented(title: str) -> dict[str, list[str]]:
    """Columns and their types in the table under a heading."""
    text = DOC.read_text(encoding="utf-8").split(f"### {title}\n")[1]
    text = text.split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.MULTILINE)
    return {name: re.findall(r"`([^`]+)`", types) for name, types in rows}


def types_of(schema: pa.Schema) -> dict[str, str]:
    return {
        field.name: f"list<{field.type.value_type}>"
        if pa.types.is_list(field.type)
        else str(field.type)
        for field in schema
    }


def narrow_and_wide(title: str, which: slice = slice(None)) -> Iterator[dict[str, str]]:
    found = documented(title)
    for pick in (0, -1):
        yield {name: types[pick] for name, types in list(found.items())[which]}


def test_columns_are_as_documented() -> None:
    assert list(narrow_and_wide("corpus")) == [types_of(BLOCKS_SCHEMA)] * 2
    target = list(narrow_and_wide("externalize/target"))
    assert target == [types_of(tokens_schema(size)) for size in (65_536, 65_537)]
    own = list(narrow_and_wide("externalize/source"))
    for scheme, gone in {"top": {"counts"}, "sampled": {"drops", "tail"}}.items():
        for n, (size, most) in enumerate([(65_536, 255), (65_537, 256)]):
            expected = target[n] | {k: v for k, v in own[n].items() if k not in gone}
            assert types_of(source_schema(size, scheme, most)) == expected
    fuse = list(narrow_and_wide("fuse"))
    assert fuse == [types_of(fused_schema(size, size)) for size in (65_536, 65_537)]


def test_no_column_has_nulls() -> None:
    for schema in (tokens_schema(9), source_schema(9, "top", 9), fused_schema(9, 9)):
        for field in schema:
            assert not field.nullable, field.name
            if pa.types.is_list(field.type):
                assert not field.type.value_field.nullable, field.name


def test_manifest_keys_are_as_documented(made_store: Path) -> None:
    written = json.loads((made_store / MANIFEST).read_text(encoding="utf-8"))
    text = DOC.read_text(encoding="utf-8").split("## manifest.json\n")[1].split("**Identity")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(written)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_reading_with_pyarrow_alone_as_documented(made_store: Path) -> None:
    names: dict[str, Any] = {}
    snippet = snippets()[1]
    assert "fusellm" not in snippet
    exec(snippet, names)
    rows = names["read"](str(made_store))
    for block in open_store(made_store):
        for n in range(block.positions):
            number, position, read_bytes, ids, masses, tail, true_log_prob = next(rows)
            at = block.at(n)
            assert (number, position, read_bytes) == (block.number, n, at.read_bytes)
            assert ids == at.ids.tolist()
            np.testing.assert_allclose(masses, at.masses, rtol=1e-5)
            assert tail == pytest.approx(at.tail, rel=1e-5)
            assert true_log_prob == pytest.approx(at.true_log_prob, abs=1e-6)
    assert next(rows, None) is None


def test_reading_from_a_program_as_documented(
    made_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = snippets()[0].replace("runs/x/externalize/python", str(made_store))
    exec(snippet.replace("store[17].at(3)", "store[2].at(0)"), {})
    assert "made" in capsys.readouterr().out


def test_importing_fusellm_costs_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import fusellm; "
        "new = {n.split('.')[0] for n in set(sys.modules) - before}; print(*new - {'fusellm'}); "
        "fusellm.open_store; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, heavy = ran.stdout.splitlines()
    assert set(new.split()) <= set(sys.stdlib_module_names)
    assert heavy == "set()"
    assert fusellm.DistributionStore is DistributionStore
    assert "open_store" in dir(fusellm)
    with pytest.raises(AttributeError, match="no attribute 'opn_store'"):
        fusellm.opn_store  # noqa: B018


def test_what_differs_is_named_as_a_recipe_has_it() -> None:
    """A field whose name is a word of Python bears an underscore, and its key does not."""
    small, large = ObjectiveSettings.model_validate({"lambda": 0.3}), ObjectiveSettings()
    now, before = (
        Identity("train/fused", {"objective": one.model_dump()}, {}) for one in (small, large)
    )
    assert now.differences(before) == ["objective.lambda was 0.9 and is now 0.3"]
    blocks: list[type[BaseModel]] = [SettingsBlock]
    for block in blocks:
        blocks += block.__subclasses__()
        for name, field in block.model_fields.items():
            assert (field.alias or name) == name.removesuffix("_")
    assert len(blocks) > 10
