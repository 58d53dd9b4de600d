"""Trainings of a study at a time: in processes of this machine, or on a Ray cluster."""

import multiprocessing
import os
import platform
import secrets
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusellm.config import Recipe
from fusellm.errors import ClusterError, FusellmError
from fusellm.progress import Silent
from fusellm.reading.engine import EngineSettings
from fusellm.reading.ray_cluster import cluster, no_room_note, one_line, size_of_workers
from fusellm.reading.ray_worker import require_gpu, require_software
from fusellm.store.files import write_text
from fusellm.store.writer import software_versions
from fusellm.study.trainings import Trainings, identity_of

_LISTEN_EVERY_SECONDS = 1.0
_RETRIES = 2  # of a training whose worker is lost: it goes on from its last checkpoint


@dataclass(frozen=True)
class ApartTraining:
    """A training that a process of its own can do, all that it reads being there.

    Attributes:
        run: its folder; absolute.
        which: `fused` or `clm`.
        identity: of what it is made from, where it was asked for.
        trusted: whether code that models bring along may run.
    """

    recipe: Recipe
    run: Path
    which: str
    identity: str
    trusted: bool

    def train(self, threads: int) -> None:
        """Train, or go on with it; nothing is shown.

        Args:
            threads: that torch computes with on a CPU.

        Raises:
            ClusterError: the target is another one here.
        """
        torch.set_num_threads(threads)
        trainings = Trainings(self.run, Silent(), self.trusted)
        pipeline = trainings.pipeline(self.recipe, ".")
        if identity_of(pipeline, self.which) != self.identity:
            raise ClusterError(
                f"{self.recipe.target.model} on {platform.node()}, where a training was to run, is "
                "not the model that is there for the driver; copy the one over the other"
            )
        trainings.train(pipeline, self.which, ensured=True)


Progressing = Generator[str | None, None, None]
"""None whenever a training is finished; else what the user is told."""


def train_in_processes(tasks: Sequence[ApartTraining], jobs: int) -> Progressing:
    """Train in so many processes of this machine.

    With GPUs each training sees one of those that this process sees, in turn; without, the cores
    are divided.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = list(map(str, range(torch.cuda.device_count())))
    gpus = seen.split(",")[: len(gpus)] if seen else gpus
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(_train_here, task, threads, gpus[number % len(gpus)] if gpus else None)
            for number, task in enumerate(tasks)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_here(task: ApartTraining, threads: int, device: str | None) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    task.train(threads)


def train_on_ray(
    tasks: Sequence[ApartTraining], folder: Path, settings: EngineSettings
) -> Progressing:
    """Train on a Ray cluster.

    Each training is a task of one worker's CPUs and GPUs. It reads and writes the study's folder,
    which all machines must have at the same place, as they must have the models. A lost worker's
    training goes on elsewhere, from its last checkpoint.

    Args:
        folder: the study's; absolute.

    Raises:
        ClusterError: the cluster is not there, has no room, has other software or another folder,
            or its workers are lost again and again.
        FusellmError: what a training raises.
    """
    file = folder / ".seen-by-all"
    secret = secrets.token_hex(16)
    write_text(file, secret)
    place = _Place(str(Path.cwd()), str(file), secret, software_versions())
    try:
        with cluster(settings) as (ray, started_here):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            size = size_of_workers(nodes, settings, spread=False)
            if (note := no_room_note(size, started_here)) is not None:
                yield note
            remote = ray.remote(
                num_cpus=size.cpus,
                num_gpus=size.gpus,
                max_calls=1,  # a process that has used one GPU stays on it
                max_retries=_RETRIES,
                scheduling_strategy="SPREAD",
            )(_train_there)
            left, asked = deque(tasks), set[Any]()
            try:
                while left or asked:
                    while left and len(asked) < size.workers:
                        asked.add(remote.remote(left.popleft(), size.cpus, size.gpus, place))
                    ready, _ = ray.wait(list(asked), timeout=_LISTEN_EVERY_SECONDS)
                    for ref in ready:
                        asked.remove(ref)
                        _taken(ray, ref)
                        yield None
            finally:
                for ref in asked:
                    ray.cancel(ref, force=True)  # at once; checkpoints are whole at any time
    finally:
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Place:
    """What a worker must have alike with the driver.

    Attributes:
        folder: that relative paths of a recipe are in.
        file: one of the study's folder, which holds `secret`.
    """

    folder: str
    file: str
    secret: str
    software: Mapping[str, str]


def _train_there(task: ApartTraining, cpus: int, gpus: float, place: _Place) -> None:
    node, file = platform.node(), Path(place.file)
    require_software(place.software, node)
    if not gpus:  # Ray leaves those that a machine has in sight
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    require_gpu(gpus, node)
    if not file.is_file() or file.read_text(encoding="utf-8") != place.secret:
        raise ClusterError(
            f"{node}, where a training was to run, does not see {file.parent}: with --engine ray "
            "the study's folder must be on a file system that all machines share; name one "
            "with --out"
        )
    if Path(place.folder).is_dir():
        os.chdir(place.folder)
    task.train(cpus)


def _taken(ray: Any, ref: Any) -> None:
    """Raises what a training has raised there."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, FusellmError):
            raise cause from None
        if "failed to import" in str(error) or "No module named 'fusellm" in str(error):
            raise ClusterError(
                f"a machine of the cluster cannot import fusellm: {one_line(error)}. Install the "
                "same version there, with its dependencies"
            ) from error
        if isinstance(error, ray.exceptions.RayTaskError):
            raise cause or error from error
        raise ClusterError(
            f"workers are lost again and again while they train: {one_line(error)}. Finished "
            "trainings are kept; where memory ran out, give fewer --workers or more --worker-cpus"
        ) from error
