"""Stores, manifests and kept maps that somebody else made: read, or refused by name; never in
silence, and never a crash. What is legal and what is not, `mutations.py` says."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mutations
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import Ragged
from fusellm.errors import StoreError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.externalized import layout_of
from fusellm.store.fused import fused_layout
from fusellm.store.manifest import StageFolder
from fusellm.store.opened import open_store
from fusellm.store.translations import cached_translation
from fusellm.store.verify import repair, verify_stage
from stores import Columns, rewrite, rewrite_columns, some, write_store

SHARD = mutations.SHARD


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as far as fuse."""
    place = tmp_path_factory.mktemp("values") / "run"
    pipeline(world, place).execute(["corpus", "externalize", "fuse"])
    return place


@pytest.fixture(scope="module")
def kinds(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of shard."""
    root = tmp_path_factory.mktemp("kinds")
    mutations.make(root, run)
    return root


def pipeline(world: Path, run: Path) -> Pipeline:
    return Pipeline(resolve_paths(load_recipe(world / "recipe.yaml"), world), run, Silent())


def at(column: str, entry: int | slice, value: Any) -> Callable[[Columns], None]:
    """A change of one entry, or of several."""

    def change(columns: Columns) -> None:
        columns[column].values[entry] = value

    return change


# Each stage refuses what others wrote, and says where it is wrong.


@pytest.mark.parametrize(
    ("folder", "change", "stage", "message"),
    [
        ("externalize/second", at("kept_ids", 100, 60_000), "fuse", "'kept_ids': 60000 is not"),
        ("externalize/second", at("ids", 3, 400), "fuse", "'ids': 400 is not from 0 to 399"),
        ("externalize/second", at("counts", 7, 0), "fuse", "'counts': 0 is not from 1 to 8"),
        ("externalize/second", at("kept", 7, 0), "fuse", "'kept': 0 is not from 1 to 8"),
        ("externalize/second", at("bytes", 9, 60_000), "fuse", "'bytes': its tokens have 60,"),
        ("externalize/target", at("bytes", 9, 200), "fuse", "'bytes': its tokens have"),
        ("externalize/target", at("ids", 3, 60_000), "fuse", "'ids': 60000 is not from 0 to"),
        ("externalize/target", at("ids", 3, 60_000), "train", "'ids': 60000 is not from 0 to"),
        ("fuse", at("masses", 5, 2.5), "train", "'masses': 2.5 is not from 0 to"),
        ("fuse", at("rest", 5, np.nan), "train", "'rest': nan is not from 0 to"),
        ("fuse", at("source", 5, 2), "train", "'source': 2 is not from 0 to 1"),
        ("fuse", at("outcomes", 5, 60_000), "train", "'outcomes': its source has no outcome"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:24],
)
def test_a_stage_refuses_values_that_cannot_be(
    world: Path,
    run: Path,
    tmp_path: Path,
    folder: str,
    change: Callable[[Columns], None],
    stage: str,
    message: str,
) -> None:
    place = tmp_path / "run"
    shutil.copytree(run, place)
    if folder != "fuse":  # which was made from something else then
        shutil.rmtree(place / "fuse")
    rewrite_columns(place / folder, SHARD, change)
    part = "train/clm" if (folder, stage) == ("externalize/target", "train") else stage
    with pytest.raises(StoreError, match=message) as refused:
        pipeline(world, place).execute([part])
    assert f"{place / folder / SHARD} is damaged (block " in str(refused.value)
    assert f"fusellm store verify {place / folder} --repair" in str(refused.value)


def test_a_source_of_other_blocks_is_refused(world: Path, run: Path, tmp_path: Path) -> None:
    """Right in itself, and of another corpus."""
    place = tmp_path / "run"
    shutil.copytree(run, place)
    shutil.rmtree(place / "fuse")
    source = place / "externalize" / "second"
    manifest = json.loads((source / "manifest.json").read_text())
    second = sorted(manifest["shards"])[1]
    data = (source / second).read_bytes()
    cuts = np.cumsum([length for length, _ in manifest["shards"][second]["segments"]])[:-1]
    counts = manifest["shards"][second]["counts"]
    rewrite(source, SHARD, data, cuts.tolist(), **counts)
    with pytest.raises(StoreError, match=r"it has the blocks .*, and the corpus has 0 to"):
        pipeline(world, place).execute(["fuse"])


def test_verify_finds_values_that_cannot_be_and_repair_drops_them(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, [some(70, False, 1), some(70, False, 2)], sampled=False)
    assert verify_stage(path).faults == ()
    before = open_store(path)[0]
    rewrite_columns(path, "train-00001.arrow", at("drops", slice(0, 50), 60_000))
    (fault,) = verify_stage(path).faults
    assert fault.file == "train-00001.arrow"
    assert "column 'drops': masses of a position add up to" in fault.what
    store = open_store(path)
    assert np.array_equal(store[0].ids, before.ids)
    with pytest.raises(StoreError, match=r"train-00001.arrow is damaged \(block \d+, column"):
        list(store)
    assert repair(verify_stage(path)) == ["train-00001.arrow"]
    assert len(list(open_store(path))) == 70


def test_damaged_outcomes_are_one_fault_and_no_other(run: Path, tmp_path: Path) -> None:
    """The shards that are read by them are whole."""
    place = tmp_path / "fuse"
    shutil.copytree(run / "fuse", place)
    assert verify_stage(place).faults == ()
    path = place / "outcomes-second.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert repair(verify_stage(place)) == [path.name]


def test_mass_on_an_outcome_without_ids_is_refused() -> None:
    """The loss of it would be infinite."""
    one = OutcomeSets(np.array([0, 1, 4]), np.array([1, 4, 4]), np.arange(4))
    batch = {
        "block": np.array([0]),
        "ids": column([0, 1], np.int64),
        "parts": column([1], np.uint8),
        "source": column([0], np.int8),
        "lengths": column([2], np.uint16),
        "outcomes": column([1, 2], np.uint16),
        "masses": column([1, 0], np.float32),
        "rest": column([0], np.float32),
    }
    layout = fused_layout(4, [one])
    assert layout.wrong(batch) is None
    wrong = layout.wrong(batch | {"masses": column([0.5, 0.5], np.float32)})
    assert wrong is not None
    assert wrong.what == "2 has mass and no ids"


def column(values: list[float], dtype: type) -> Ragged:
    return Ragged(np.array([0, len(values)]), np.array(values, dtype=dtype))


def test_a_wrong_batch_is_refused_each_time_and_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(path, [some(70, True, 1)], sampled=True)
    rewrite_columns(path, SHARD, at("counts", -1, 200))
    store = open_store(path)
    assert store[63].number == 63
    for _ in range(2):
        with pytest.raises(StoreError, match="'counts': 200 is not from 1 to 8"):
            store[64]


def test_another_tokenizer_than_the_stores_is_refused(world: Path, run: Path) -> None:
    folder = StageFolder(run / "externalize" / "second")
    with pytest.raises(
        StoreError, match="made with a tokenizer of 400 tokens and is read with one of 401"
    ):
        layout_of(folder, 401)


# Fuzzing


def test_some_mutated_shards_are_refused_or_read_as_they_are(kinds: Path) -> None:
    ends = mutations.many(kinds, range(70))
    assert min(ends["refused"], ends["legal"]) > 5, ends


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_thousand_mutated_shards(kinds: Path) -> None:
    """In processes of their own, each of which is to end by itself."""
    ends: Counter[str] = Counter()
    for first in range(100, 2500, 300):
        command = [sys.executable, mutations.__file__, str(kinds), str(first), str(first + 300)]
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
        )
        assert done.returncode == 0, f"seeds from {first}: {done.returncode}\n{done.stderr}"
        ends.update(json.loads(done.stdout))
    print(f"\n{sum(ends.values())} mutated shards: {dict(ends)}, no crash, none in silence")
    assert sum(ends.values()) >= 2000


@pytest.mark.parametrize(
    "cases", [60, pytest.param(1000, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])]
)
def test_mutated_manifests_are_refused_or_change_no_block(tmp_path: Path, cases: int) -> None:
    stores = {}
    for sampled in (True, False):
        path = tmp_path / f"store-{sampled}"
        write_store(path, [some(12, sampled, 1), some(9, sampled, 2)], sampled)
        stores[path] = {block.number: block for block in open_store(path)}
    ends: Counter[str] = Counter()
    for case in range(cases):
        path = list(stores)[case % 2]
        shutil.copytree(path, tmp_path / "changed")
        chance = random.Random(f"manifest {case}")
        ends[mutations.outcome_of_manifest(tmp_path / "changed", chance, stores[path])] += 1
        shutil.rmtree(tmp_path / "changed")
    print(f"\n{cases} mutated manifests: {dict(ends)}")
    assert min(ends["refused"], ends["legal"]) > cases / 20, ends


@pytest.mark.parametrize(
    "cases", [60, pytest.param(1000, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])]
)
def test_mutated_maps_are_made_anew_or_are_maps(
    tmp_path: Path, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSELLM_CACHE", str(tmp_path))
    of_source, of_target = np.array([2, -1, 0, 1, 2]), np.array([0, 1, 2, -1, 2, 1])
    made = VocabularyMap(of_source, of_target, 3, complete=True)
    cached_translation("partition", "a" * 24, "b" * 24, (5, 6), lambda: made)
    (path,) = (tmp_path / "maps").iterdir()
    ends: Counter[str] = Counter()
    for case in range(cases):
        ends[mutations.outcome_of_map(random.Random(f"map {case}"), path, made)] += 1
    print(f"\n{cases} mutated maps: {dict(ends)}")
    assert min(ends["refused"], ends["legal"]) > cases / 20, ends
