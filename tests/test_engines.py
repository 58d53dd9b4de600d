"""What the stage does with what an engine tells, whichever it is."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fusellm
from fusellm.errors import ClusterError
from fusellm.reading import local_engine
from fusellm.reading.engine import (
    EngineSettings,
    Event,
    Events,
    ModelLoaded,
    ReadingTask,
    ReadShard,
)
from fusellm.reading.worker import Worker
from fusellm.recipe_file import resolve_paths
from fusellm.stages import externalize
from fusellm.store.manifest import StageFolder
from fusellm.store.writer import StageWriter

LOCAL = externalize.ENGINES["local"]


def run_of(world: Path, folder: Path) -> fusellm.Run:
    recipe = fusellm.load_recipe(world / "recipe.yaml", ["corpus.shard_blocks=12"])
    return fusellm.Run(resolve_paths(recipe, world), folder).corpus()


def engine_of(monkeypatch: pytest.MonkeyPatch, told: Any, world: Path, folder: Path) -> fusellm.Run:
    """A run whose engine tells `told(events of the local one)`."""

    def engine(task: ReadingTask, settings: EngineSettings) -> Events:
        yield from told(LOCAL(task, settings))

    monkeypatch.setitem(externalize.ENGINES, "local", engine)
    return run_of(world, folder)


def test_one_thread_alone_writes_the_manifest(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a device joins while shards are being written."""

    def joined(events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            yield event
            if isinstance(event, ReadShard):
                yield ModelLoaded("another", "0" * 64)

    threads: set[int] = set()
    write, describe = StageWriter.write, StageWriter.describe

    def my_write(self: StageWriter, *arguments: Any, **named: Any) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        write(self, *arguments, **named)

    def my_describe(self: StageWriter, about: Any) -> None:
        threads.add(threading.get_ident())
        describe(self, about)

    run = engine_of(monkeypatch, joined, world, tmp_path / "run")
    monkeypatch.setattr(StageWriter, "write", my_write)
    monkeypatch.setattr(StageWriter, "describe", my_describe)
    run.externalize("second")
    assert len(threads) == 1
    assert StageFolder(tmp_path / "run/externalize/second").about["device"] == "another"


def test_what_has_been_read_is_written_though_the_engine_fails(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def failing(events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            yield event
            if isinstance(event, ReadShard):
                read.append(event.name)
                if len(read) == 3:
                    raise ClusterError("workers are lost again and again")

    write = StageWriter.write

    def slowly(self: StageWriter, *arguments: Any, **named: Any) -> None:
        time.sleep(0.2)
        write(self, *arguments, **named)

    run = engine_of(monkeypatch, failing, world, tmp_path / "run")
    monkeypatch.setattr(StageWriter, "write", slowly)
    with pytest.raises(ClusterError, match="again and again"):
        run.externalize("second")
    assert sorted(StageFolder(tmp_path / "run/externalize/second").shards) == read


def test_a_shard_is_let_go_of_while_the_next_one_is_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard's distributions may be most of a machine's memory. Here it is written at once."""

    class AtOnce:
        def __init__(self, name: str) -> None:
            pass

        def __enter__(self) -> "AtOnce":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, job: Callable[[], None]) -> None:
            job()

        def check(self) -> None:
            pass

    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    steps, read_shards = Worker.steps, local_engine.read_shards

    def watched(self: Worker, prepared: Any) -> Any:
        read = yield from steps(self, prepared)
        made.append(weakref.ref(read))
        return read

    def told(*arguments: Any) -> Iterator[Any]:
        for event in read_shards(*arguments):
            if isinstance(event, int):
                gc.collect()
                alive.append(sum(one() is not None for one in made))
            yield event
            del event

    monkeypatch.setattr(externalize, "Background", AtOnce)
    monkeypatch.setattr(Worker, "steps", watched)
    monkeypatch.setattr(local_engine, "read_shards", told)
    run_of(world, tmp_path / "run").externalize("second")
    assert len(made) > 5
    assert set(alive) == {0}


def test_suites_that_nobody_wants_read_nothing(world: Path, tmp_path: Path) -> None:
    run = run_of(world, tmp_path / "run")
    assert run.execute("evaluate-suites") is run
