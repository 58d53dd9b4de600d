"""Links inside a run that somebody else made: nothing outside of the run is written or removed."""

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from fusellm.errors import StoreError
from fusellm.progress import Silent
from fusellm.store.files import write_whole
from fusellm.store.identity import Identity
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import RECIPE, removable
from fusellm.store.verify import repair, verify_stage
from fusellm.store.writer import StageWriter, set_aside
from fusellm.training.checkpoints import last_checkpoint
from stores import IDENTITY, flip, some, write_store

PRECIOUS = b"not of this run"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside of the run."""
    path = tmp_path / "victim"
    path.write_bytes(PRECIOUS)
    return path


def run_with_a_store(place: Path, finish: bool) -> Path:
    """A run with one source's distributions; gives their folder."""
    store = place / "externalize" / "made"
    write_store(store, [some(5, True)], sampled=True, finish=finish)
    (place / RECIPE).touch()
    return store


@pytest.mark.parametrize("name", [".lock", "train-00001.arrow.writing", "model.safetensors"])
def test_a_link_where_a_stage_writes_is_refused(tmp_path: Path, victim: Path, name: str) -> None:
    store = run_with_a_store(tmp_path / "run", finish=False)
    (store / name).symlink_to(victim)
    with (
        pytest.raises(StoreError, match=f"{name} is a link, to {victim}, .* remove it"),
        StageWriter.open(store, IDENTITY),
    ):
        pass
    assert victim.read_bytes() == PRECIOUS


def test_a_link_as_lock_of_a_finished_stage_is_not_followed(tmp_path: Path, victim: Path) -> None:
    store = run_with_a_store(tmp_path / "run", finish=True)
    (store / ".lock").symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.lock could not be"), StageWriter.open(store, IDENTITY):
        pass
    (store / ".lock").unlink()
    (store / ".lock").hardlink_to(victim)
    with StageWriter.open(store, IDENTITY):
        pass
    assert victim.read_bytes() == PRECIOUS


@pytest.mark.parametrize("name", ["file", "file.writing"])
def test_a_file_is_written_in_place_of_a_link(tmp_path: Path, victim: Path, name: str) -> None:
    (tmp_path / name).symlink_to(victim)
    write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert victim.read_bytes() == PRECIOUS


@pytest.mark.parametrize("linked", ["externalize", "externalize/made"])
def test_a_stage_that_lies_outside_of_its_run_is_not_written_to(
    tmp_path: Path, linked: str
) -> None:
    other = run_with_a_store(tmp_path / "other", finish=False)
    link = tmp_path / "run" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "other" / linked)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    store = tmp_path / "run" / "externalize" / "made"
    with (
        pytest.raises(StoreError, match=f"{store} is a link out of {tmp_path / 'run'}, to {other}"),
        StageWriter.open(store, IDENTITY),
    ):
        pass
    flip(other / "train-00000.arrow", 500)
    with pytest.raises(StoreError, match="is a link out of"):
        repair(verify_stage(store))
    assert {path.name for path in other.iterdir()} == set(before)


def test_a_run_that_is_reached_by_a_link_is_a_run(tmp_path: Path) -> None:
    """A scratch disk under another name is the user's own affair."""
    run_with_a_store(tmp_path / "run", finish=False)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with StageWriter.open(tmp_path / "link" / "externalize" / "made", IDENTITY) as folder:
        folder.finish({})
    assert StageFolder(tmp_path / "run" / "externalize" / "made").complete


def test_linked_checkpoints_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other" / "train" / "fused-checkpoints" / "checkpoint-7"
    other.mkdir(parents=True)
    (other / "optimizer.pt").write_bytes(PRECIOUS)
    (tmp_path / "run" / "train").mkdir(parents=True)
    link = tmp_path / "run" / "train" / "fused-checkpoints"
    link.symlink_to(other.parent)
    with pytest.raises(StoreError, match="is a link out of"):
        last_checkpoint(link, Silent())
    link.unlink()
    link.mkdir()
    (link / "checkpoint-9").symlink_to(other)
    with pytest.raises(StoreError, match=f"checkpoint-9 is a link, to {other}"):
        last_checkpoint(link, Silent())
    assert (other / "optimizer.pt").read_bytes() == PRECIOUS


def test_what_is_set_aside_stays_in_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = run_with_a_store(run, finish=True)
    (tmp_path / "elsewhere").mkdir()
    (run / "aside").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link out of"):
        set_aside(run, [store])
    assert store.exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_clean_removes_nothing_behind_a_link(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run_with_a_store(other, finish=True)
    run.mkdir()
    (run / RECIPE).touch()
    with StageWriter.open(run / "evaluate", Identity("evaluate", {}, {})) as folder:
        folder.finish({})
    (run / "externalize").symlink_to(other / "externalize")
    with pytest.raises(StoreError, match="is a link out of"):
        removable(run, stores=True, everything=False)
    assert run / "externalize" in removable(run, stores=False, everything=True)


# Locks


def flock_fails(number: int) -> Callable[..., None]:
    def fails(descriptor: int, how: int) -> None:
        raise OSError(number, "as this file system says")

    return fails


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock_fails(number))
    store = run_with_a_store(tmp_path / "run", finish=True)
    assert StageFolder(store).complete
    assert not (store / ".lock").exists()


def test_a_lock_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", flock_fails(errno.EIO))
    with pytest.raises(StoreError, match="could not be locked: as this file system says"):
        run_with_a_store(tmp_path / "run", finish=True)


def test_a_folder_that_cannot_be_written_to_is_read_if_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = run_with_a_store(tmp_path / "finished", finish=True)
    unfinished = run_with_a_store(tmp_path / "unfinished", finish=False)
    before = (finished / "manifest.json").read_bytes()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("os.open", lambda *_: pytest.fail("a lock was made"))
    with StageWriter.open(finished, IDENTITY) as folder:
        assert folder.complete
    with (
        pytest.raises(StoreError, match="was made from something else"),
        StageWriter.open(
            finished, Identity("externalize/made", {"dtype": "another"}, IDENTITY.inputs)
        ),
    ):
        pass
    assert (finished / "manifest.json").read_bytes() == before
    with pytest.raises(pytest.fail.Exception), StageWriter.open(unfinished, IDENTITY):
        pass
