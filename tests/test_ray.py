"""Sources read on a Ray cluster: the same store, whatever workers do and whichever are lost.

Those marked `ray` start clusters on this machine, of two nodes where it matters; each worker is a
process that loads torch, which takes seconds.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm.cli.main import main
from fusellm.errors import ClusterError, FusellmError, ModelError, NumericsError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.reading import ray_cluster, ray_engine, ray_worker
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.reading.ray_cluster import size_of_workers
from fusellm.reading.worker import Done
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import Block
from fusellm.store.manifest import StageFolder
from fusellm.store.writer import StageWriter
from fusellm.study import apart
from fusellm.study.run import run_study

SOURCE = "externalize/second"
SMALL_SHARDS = "corpus.shard_blocks=8"


class Said(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def pipeline(
    world: Path, run: Path, engine: EngineSettings, *changes: str, said: Said | None = None
) -> Pipeline:
    """The tiny world's run, its sources read by an engine."""
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", [SMALL_SHARDS, *changes]), world)
    return Pipeline(recipe, run, said or Said(), engine)


def shards(run: Path) -> dict[str, bytes]:
    """Content of a source's shards."""
    return {path.name: path.read_bytes() for path in (run / SOURCE).glob("*.arrow")}


def manifest(run: Path) -> dict[str, Any]:
    """A source's manifest, without what differs from run to run."""
    found: dict[str, Any] = json.loads((run / SOURCE / "manifest.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "checksum")}


@pytest.fixture(scope="module", autouse=True)
def tokens() -> Iterator[None]:
    """Clusters of these tests ask for a token, which Ray reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield


# Without Ray


def test_a_missing_ray_is_named_before_any_model_is_looked_for(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        ray_cluster, "find_spec", lambda name: None if name == "ray" else original(name)
    )
    arguments = ["run", str(world / "recipe.yaml"), "--out", str(tmp_path / "run")]
    arguments += ["--engine", "ray", "--set", "target.model=/no/such"]
    monkeypatch.setattr(sys, "argv", ["fusellm", *arguments])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said == "fusellm: --engine ray needs the package ray: pip install 'fusellm[ray]'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--ray-address", "auto"),
        ("--workers", "2"),
        ("--worker-cpus", "1"),
        ("--worker-gpus", "0"),
    ],
)
@pytest.mark.parametrize("command", ["run", "externalize"])
def test_options_of_the_cluster_are_refused_without_it(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
    value: str,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["fusellm", command, str(world / "recipe.yaml"), option, value]
    )
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said == f"fusellm: {option}: only for --engine ray; add that, or leave it away\n"


def test_settings_that_have_no_meaning_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"--worker-gpus 1\.5 must be a whole number"):
        EngineSettings("ray", worker_gpus=1.5)
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(ray_cluster, "version", lambda name: "2.60.0")
    with pytest.raises(ClusterError, match=r"Ray Client \(ray://head:10001\) is not supported"):
        ray_cluster.require_ray(EngineSettings("ray", "ray://head:10001"))
    monkeypatch.setenv("RAY_ADDRESS", "ray://other:10001")
    with pytest.raises(ClusterError, match=r"Ray Client \(ray://other:10001\) is not supported"):
        ray_cluster.require_ray(EngineSettings("ray"))


def test_a_cluster_that_asks_for_no_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(ray_cluster, "version", lambda name: "2.51.2")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match=r"Ray 2\.51\.2 runs what anybody sends it"):
        ray_cluster.require_ray(EngineSettings("ray"))
    monkeypatch.setattr(ray_cluster, "version", lambda name: "2.52.0")
    found = EngineSettings("ray", "head:6379")
    with pytest.raises(ClusterError, match="at head:6379 is used only if it asks for a token"):
        ray_cluster.require_ray(found)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    ray_cluster.require_ray(found)
    ray_cluster.set_up_tokens(found)
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is taken back in the end
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ray_cluster.set_up_tokens(EngineSettings("ray"))
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_cluster_that_is_started_here_listens_to_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    fake: Any = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **arguments: asked.update(arguments),
        shutdown=lambda: None,
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_cluster.connected(fake, EngineSettings("ray")) as started:
        assert started
    assert (asked["address"], asked["_node_ip_address"]) == ("local", "127.0.0.1")
    assert asked["include_dashboard"] is False


GPUS_8 = {"CPU": 96.0, "GPU": 8.0}
HEAD = {"CPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "settings", "spread", "expected"),
    [
        ([{"CPU": 2.0}], {}, False, (1, 2, 0, 1)),
        ([{"CPU": 64.0}], {}, False, (8, 8, 0, 8)),
        ([{"CPU": 64.0}], {"workers": 2}, False, (2, 32, 0, 2)),
        ([{"CPU": 2.0}], {"workers": 5}, False, (5, 1, 0, 2)),
        ([HEAD, {"CPU": 16.0}], {"worker_cpus": 4}, False, (4, 4, 0, 4)),
        ([HEAD, GPUS_8, GPUS_8], {}, False, (16, 8, 1, 16)),
        ([HEAD, GPUS_8, GPUS_8], {}, True, (2, 8, 8, 2)),
        ([{"CPU": 16.0, "GPU": 8.0}], {}, False, (8, 2, 1, 8)),
        ([{"CPU": 4.0, "GPU": 8.0}], {}, False, (4, 1, 1, 4)),
        ([HEAD, GPUS_8], {"worker_gpus": 2.0}, False, (4, 8, 2, 4)),
        ([HEAD, GPUS_8], {"worker_gpus": 0.5, "worker_cpus": 2}, False, (16, 2, 0.5, 16)),
        ([HEAD, GPUS_8], {"worker_gpus": 0.3, "worker_cpus": 2}, False, (24, 2, 0.3, 24)),
        ([HEAD, GPUS_8], {"worker_gpus": 0}, False, (12, 8, 0, 12)),
        ([GPUS_8], {"workers": 2}, True, (2, 96, 8, 1)),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(
    nodes: list[dict[str, float]],
    settings: dict[str, Any],
    spread: bool,
    expected: tuple[int, int, float, int],
) -> None:
    """(workers, cpus, gpus, room)"""
    found = size_of_workers(nodes, EngineSettings("ray", **settings), spread)
    assert found == expected


@pytest.mark.parametrize(
    ("nodes", "settings"),
    [([HEAD], {"worker_gpus": 1}), ([HEAD, HEAD], {"worker_cpus": 4}), ([{}], {}), ([], {})],
)
def test_a_cluster_without_room_is_refused(
    nodes: list[dict[str, float]], settings: dict[str, Any]
) -> None:
    with pytest.raises(ClusterError, match="no node of the cluster has room for a worker of"):
        size_of_workers(nodes, EngineSettings("ray", **settings), spread=False)


# With Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, which run until the tests are done."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        found.add_node(num_cpus=1)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """The local engine with as many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def begun(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its corpus."""
    run = tmp_path_factory.mktemp("begun") / "run"
    pipeline(world, run, LOCAL).execute(["corpus"])
    return run


@pytest.fixture(scope="module")
def local(
    world: Path, begun: Path, threads: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run, read in this process."""
    run = tmp_path_factory.mktemp("local") / "run"
    shutil.copytree(begun, run)
    pipeline(world, run, LOCAL).execute([SOURCE])
    assert len(shards(run)) > 20
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A run that is to be read."""
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def on(cluster: Any, workers: int = 1) -> EngineSettings:
    """Workers of a CPU on a cluster that runs."""
    return EngineSettings("ray", cluster.address, workers=workers, worker_cpus=1)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_store_as_in_one_process(
    world: Path, local: Path, run: Path, cluster: Any, workers: int
) -> None:
    import ray

    pipeline(world, run, on(cluster, workers)).execute([SOURCE])
    assert shards(run) == shards(local)
    assert manifest(run) == manifest(local)
    assert StageFolder(run / SOURCE).fingerprint == StageFolder(local / SOURCE).fingerprint
    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_worker_that_is_killed_loses_nothing(
    world: Path,
    local: Path,
    run: Path,
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its shards are read by the other, and by the one that comes in its place."""
    pids = tmp_path / "pids"
    pids.mkdir()

    class Slow(ray_worker.RemoteWorker):
        def read(self, blocks: list[Block]) -> Done:
            (pids / str(os.getpid())).touch()
            time.sleep(0.2)
            return super().read(blocks)

    original, killed = StageWriter.write, []

    def killing(self: StageWriter, name: str, *args: Any, **kwargs: Any) -> None:
        original(self, name, *args, **kwargs)
        if not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(ray_engine, "RemoteWorker", Slow)
    monkeypatch.setattr(StageWriter, "write", killing)
    said = Said()
    pipeline(world, run, on(cluster, 2), said=said).execute([SOURCE])
    assert killed
    assert shards(run) == shards(local)
    assert manifest(run) == manifest(local)
    (line,) = said.lines
    assert re.match(r"a worker on .* is lost, and its work is done by another one: The actor", line)


@pytest.mark.ray
def test_a_node_that_is_lost_loses_nothing(
    world: Path, local: Path, run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing has the room to come in its place."""
    third = cluster.add_node(num_cpus=1)
    third_id = third.node_id

    class Slow(ray_worker.RemoteWorker):
        def read(self, blocks: list[Block]) -> Done:
            import ray

            time.sleep(0.3 if ray.get_runtime_context().get_node_id() == third_id else 0.2)
            return super().read(blocks)

    original, removed = StageWriter.write, []

    def removing(self: StageWriter, name: str, *args: Any, **kwargs: Any) -> None:
        original(self, name, *args, **kwargs)
        if not removed:
            removed.append(third)
            cluster.remove_node(third, allow_graceful=False)

    monkeypatch.setattr(ray_engine, "RemoteWorker", Slow)
    monkeypatch.setattr(StageWriter, "write", removing)
    pipeline(world, run, on(cluster, 3)).execute([SOURCE])
    assert removed
    assert shards(run) == shards(local)


@pytest.mark.ray
def test_workers_that_always_die_end_in_an_error_and_it_goes_on_locally(
    world: Path, local: Path, run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run / SOURCE / "train-00000.arrow"

    class Dying(ray_worker.RemoteWorker):
        def read(self, blocks: list[Block]) -> Done:
            if blocks[0].number > 0:
                while not first.exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(blocks)

    monkeypatch.setattr(ray_engine, "RemoteWorker", Dying)
    with pytest.raises(ClusterError, match=r"^3 workers were lost while they read train-0000") as e:
        pipeline(world, run, on(cluster)).execute([SOURCE])
    assert "Finished shards are kept" in str(e.value)
    assert "\n" not in str(e.value)
    assert list(StageFolder(run / SOURCE).shards) == ["train-00000.arrow"]
    pipeline(world, run, LOCAL).execute([SOURCE])
    assert shards(run) == shards(local)
    assert manifest(run) == manifest(local)


@pytest.mark.ray
def test_workers_that_die_in_loading_end_in_an_error(
    world: Path, run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(ray_worker.RemoteWorker):
        def load(self, orders: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ray_engine, "RemoteWorker", Dying)
    with pytest.raises(ClusterError, match=r"^workers are lost again and again, the last one: "):
        pipeline(world, run, on(cluster, 2)).execute([SOURCE])


@pytest.mark.ray
def test_finished_shards_are_not_read_again(
    world: Path, local: Path, run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = StageWriter.write, [5]

    def full(self: StageWriter, name: str, *args: Any, **kwargs: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        original(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageWriter, "write", full)
        with pytest.raises(KeyboardInterrupt):
            pipeline(world, run, LOCAL).execute([SOURCE])
    before = {path: path.stat().st_mtime_ns for path in (run / SOURCE).glob("*.arrow")}
    assert len(before) == 5

    class Refusing(ray_worker.RemoteWorker):
        def read(self, blocks: list[Block]) -> Done:
            assert blocks[0].number >= 5 * 8
            return super().read(blocks)

    monkeypatch.setattr(ray_engine, "RemoteWorker", Refusing)
    pipeline(world, run, on(cluster)).execute([SOURCE])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert manifest(run) == manifest(local)


def broken_model(world: Path, folder: Path, how: str) -> Path:
    """A source that gives NaN, or lacks a weight."""
    if how == "nan":
        model = AutoModelForCausalLM.from_pretrained(world / "neox")
        with torch.no_grad():
            model.base_model.final_layer_norm.weight[0] = float("nan")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(world / "neox").save_pretrained(folder)
        return folder
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "neox", folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "final_layer_norm" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "kind", "part"),
    [
        ("nan", NumericsError, "source 'second' gives NaN or infinity on"),
        ("lacking", ModelError, "lacks weights that its configuration asks for"),
    ],
)
def test_errors_are_those_of_one_process(
    world: Path,
    tmp_path: Path,
    cluster: Any,
    how: str,
    kind: type[FusellmError],
    part: str,
) -> None:
    model = broken_model(world, tmp_path / "model", how)
    changes = (f"sources.1.model={model}", "corpus.shard_blocks=1000")
    messages = []
    for engine in (LOCAL, on(cluster)):
        run = tmp_path / engine.name
        pipeline(world, run, engine, *changes).execute(["corpus"])
        with pytest.raises(kind, match=part) as caught:
            pipeline(world, run, engine, *changes).execute([SOURCE])
        assert type(caught.value) is kind
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.ray
def test_a_model_that_a_worker_does_not_have(
    world: Path, run: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has gone, or become another one, on the worker's machine."""
    monkeypatch.setattr("fusellm.pipeline.require_models", lambda readers: None)  # of this one
    model = tmp_path / "model"
    shutil.copytree(world / "neox", model)
    one = pipeline(world, run, on(cluster), f"sources.1.model={model}")
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"no model folder .*model.*\(on .*, where a worker runs"):
        one.execute([SOURCE])
    shutil.copytree(world / "mpt", model)
    with pytest.raises(ModelError, match=r"where a worker runs, is not the model that is there"):
        one.execute([SOURCE])


@pytest.mark.ray
def test_other_software_on_a_worker_is_refused(
    world: Path, run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = ray_worker.software_versions() | {"torch": "1.0+cu1", "python": "3.0"}
    monkeypatch.setattr(ray_worker, "software_versions", lambda: versions)
    with pytest.raises(ClusterError, match=r"other software: torch .* \(here 1\.0\+cu1\); install"):
        pipeline(world, run, on(cluster)).execute([SOURCE])


@pytest.mark.ray
def test_a_node_without_fusellm_is_named(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    (tmp_path / "path" / "fusellm").mkdir(parents=True)
    (tmp_path / "path" / "fusellm" / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    bare = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with pytest.raises(ClusterError, match=r"cannot import fusellm: ImportError: not here"):
            pipeline(world, run, on(bare)).execute([SOURCE])
    finally:
        bare.shutdown()


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_said_at_once(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    began = time.monotonic()
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(ClusterError, match=f"the Ray cluster at {address} was not reached: "):
            pipeline(world, run, EngineSettings("ray", address)).execute([SOURCE])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(ClusterError, match=r"the Ray cluster at 127\.0\.0\.1:2 was not reached"):
        pipeline(world, run, EngineSettings("ray")).execute([SOURCE])
    assert time.monotonic() - began < 30


@pytest.fixture
def study_file(world: Path, tmp_path: Path) -> Path:
    """A study of two arms of the tiny world, with one seed."""
    few_steps = {"training.max_steps": 2, "training.save_steps": 1, "corpus.shard_blocks": 64}
    raw = {
        "name": "on-a-cluster",
        "recipe": str(world / "recipe.yaml"),
        "set": few_steps,
        "seeds": [0],
        "arms": {"clm": {"train": "clm"}, "fused": {}},
    }
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(raw), encoding="utf-8")
    return file


@pytest.mark.ray
def test_a_study_on_a_cluster_gives_the_same_page(
    tmp_path: Path, study_file: Path, cluster: Any, threads: None
) -> None:
    """A worker that is killed while it trains is replaced, and the training goes on."""
    import ray

    for name, engine in (("here", LOCAL), ("there", on(cluster, 2))):
        run_study(study_file, tmp_path / name, engine=engine)
    pages = [(tmp_path / name / "study.md").read_text() for name in ("here", "there")]
    assert pages[0].replace(str(tmp_path / "here"), "") == pages[1].replace(
        str(tmp_path / "there"), ""
    )
    assert not list((tmp_path / "there").glob(".*"))
    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_training_whose_worker_is_lost_is_done_by_another(
    tmp_path: Path, study_file: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying_once(task: Any, cpus: int, gpus: float, place: Any) -> None:
        died = Path(place.file).with_name(f"died-{task.which}")
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        task.train(cpus)

    monkeypatch.setattr(apart, "_train_there", dying_once)
    results = run_study(study_file, tmp_path / "out", engine=on(cluster, 2))
    assert list(results.arms) == ["clm", "fused"]
    assert sorted(path.name for path in (tmp_path / "out").glob("died-*")) == [
        "died-clm",
        "died-fused",
    ]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("elsewhere", r"does not see .*out: with --engine ray the study's folder must be on"),
        ("lost", r"workers are lost again and again while they train: .* fewer --workers"),
        ("wrong", r"^this arm has no rows$"),
        ("other", r"where a training was to run, is not the model that is there for the driver"),
    ],
)
def test_what_a_training_on_a_cluster_cannot_have_is_said(
    tmp_path: Path,
    study_file: Path,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    message: str,
) -> None:
    real = apart._train_there

    def failing(task: Any, cpus: int, gpus: float, place: Any) -> None:
        if how == "lost":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "wrong":
            raise NumericsError("this arm has no rows")
        if how == "other":
            task = replace(task, identity="of another model")
        else:
            Path(place.file).unlink()
        real(task, cpus, gpus, place)

    monkeypatch.setattr(apart, "_train_there", failing)
    with pytest.raises(FusellmError, match=message):
        run_study(study_file, tmp_path / "out", engine=on(cluster))


def test_a_study_has_workers_or_jobs(study_file: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with pytest.raises(ClusterError, match=r"--jobs is for this machine; .* set --workers"):
        run_study(study_file, tmp_path / "out", jobs=2, engine=EngineSettings("ray"))


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def real(mark: str, *arguments: str) -> subprocess.Popen[str]:
    """A command in a process of its own, without a cluster that runs."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "fusellm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"FUSELLM_TEST": mark},
        start_new_session=True,
    )


@pytest.mark.ray
def test_the_command_on_a_cluster_of_its_own(world: Path, local: Path, run: Path) -> None:
    """It says what the local engine says, and leaves nothing behind."""
    pytest.importorskip("ray")
    recipe = str(world / "recipe.yaml")
    mark = uuid.uuid4().hex
    arguments = ["externalize", recipe, "--out", str(run), "--set", SMALL_SHARDS, "--json"]
    command = real(mark, *arguments, "--engine", "ray", "--workers", "2")
    out, errors = command.communicate(timeout=240)
    assert command.returncode == 0, errors
    assert [row["stage"] for row in json.loads(out)][-1] == "externalize/target"
    assert "reading second: 184 blocks in" in errors
    assert "ray" not in errors.lower()
    assert shards(run) == shards(local)
    assert manifest(run) == manifest(local)
    assert processes_with(mark) == []


@pytest.mark.ray
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_stops_the_cluster_that_it_started(
    world: Path, run: Path, number: int, code: int
) -> None:
    pytest.importorskip("ray")
    mark = uuid.uuid4().hex
    arguments = ["externalize", str(world / "recipe.yaml"), "--out", str(run)]
    command = real(mark, *arguments, "--set", SMALL_SHARDS, "--engine", "ray", "--worker-cpus", "1")
    first = run / "externalize" / "first" / "manifest.json"
    deadline = time.monotonic() + 120
    while not (first.exists() and '"bytes"' in first.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)  # as a terminal does
    _, errors = command.communicate(timeout=60)
    assert command.returncode == code, errors
    assert "stopped; the same command goes on from here\n" in errors
    assert "Traceback" not in errors
    assert "ray" not in errors.lower()
    assert processes_with(mark) == []
