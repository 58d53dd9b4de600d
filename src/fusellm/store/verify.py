"""Every byte of a stage's folder against its manifest, every value against its stage's layout, and
what to do where one differs."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from fusellm.errors import StoreError
from fusellm.store import externalized, fused
from fusellm.store.answers import ANSWERS
from fusellm.store.blocks import BLOCKS
from fusellm.store.layout import Layout
from fusellm.store.manifest import MANIFEST, SHARD_SUFFIX, Segment, StageFolder
from fusellm.store.measured import NATS
from fusellm.store.run_folder import STAGES
from fusellm.store.tables import Shard, folder_bytes
from fusellm.store.writer import StageWriter
from fusellm.text_table import counted

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """A file that is not what was written.

    Attributes:
        file: its name in the stage's folder.
        what: what is wrong with it.
        record_batches: those that are damaged, from 0; empty where that is not known.
        repairable: whether it can be taken out of the manifest and made anew.
    """

    file: str
    what: str
    record_batches: tuple[int, ...] = ()
    repairable: bool = True


@dataclass(frozen=True)
class Verified:
    """What was found in one stage's folder.

    Attributes:
        stage: its name; of its folder where the manifest cannot be read.
        complete: whether the stage has finished.
        files, bytes: how many were read; those of the manifest.
    """

    path: Path
    stage: str
    complete: bool
    files: int
    bytes: int
    faults: tuple[Fault, ...]

    @property
    def repairable(self) -> list[str]:
        """Files that can be taken out of the manifest."""
        return [fault.file for fault in self.faults if fault.repairable]

    @property
    def is_emptied(self) -> bool:
        """Whether all shards are gone, as after `fusellm clean --stores`."""
        gone = len(self.faults) > 1 and all(fault.what == "missing" for fault in self.faults)
        return gone and self.complete and not any(self.path.glob("*.arrow"))

    def repaired(self, count: int) -> str:
        """What a user is told of `count` files that were taken out: how to make them anew."""
        command, _, inner = self.stage.partition("/")
        run = self.path.parents[1] if inner else self.path.parent
        place = str(run) if (run / "recipe.yaml").exists() else "RECIPE"
        anew = f"makes {'it' if count == 1 else 'them'} anew, and no others"
        if command == "train":
            anew = "trains this model again from the beginning"
        files = counted(str(count), "files")
        return f"{self.stage}: {files} taken out. This {anew}:\n    fusellm {command} {place}"


def stage_paths(path: Path) -> list[Path]:
    """A stage's folder itself, or all of a run, in the order of the stages.

    Folders with shards and no manifest are among them.

    Raises:
        StoreError: there is none.
    """
    if _is_stage(path):
        return [path]
    inside = [
        folder
        for stage in STAGES
        for folder in (path / stage, *sorted((path / stage).glob("*")))
        if _is_stage(folder)
    ]
    inside = inside or [folder for folder in sorted(path.glob("*")) if _is_stage(folder)]
    if not inside:
        what = "is not there" if not path.exists() else f"holds no {MANIFEST}"
        raise StoreError(f"{path} {what}; give the folder of a run or of one of its stages")
    return inside


def _is_stage(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / MANIFEST).exists() or any(folder.glob("*.arrow"))


def bytes_to_verify(path: Path) -> int:
    """Size of what `verify_stage` reads, near enough for a bar."""
    return folder_bytes(path)


def verify_stage(path: Path, advance: Callable[[int], object] = lambda size: None) -> Verified:
    """Read all files of a stage's manifest and compare them with what was written.

    Args:
        advance: is told how many bytes more have been read.
    """
    try:
        folder = StageFolder(path)
    except StoreError as error:
        what = str(error).removeprefix(f"{path / MANIFEST} ")
        if not (path / MANIFEST).exists():
            what = "missing, so that none of the folder's files counts; run the stage again"
        unreadable = Fault(MANIFEST, what, repairable=False)
        return Verified(path, _stage_of(path), False, 0, 0, (unreadable,))
    names = sorted(folder.shards)
    faults = [fault for name in names if (fault := fault_of(folder, name, advance)) is not None]
    size = sum(shard["bytes"] for shard in folder.shards.values())
    stage = folder.identity.stage
    return Verified(path, stage, folder.complete, len(names), size, tuple(faults))


def _stage_of(path: Path) -> str:
    inner = path.parent.name in ("generate", "externalize", "train")
    return f"{path.parent.name}/{path.name}" if inner else path.name


def fault_of(
    folder: StageFolder, name: str, advance: Callable[[int], object] = lambda size: None
) -> Fault | None:
    """What is wrong with a finished file; None where it is what its stage writes."""
    path, written = folder.path / name, folder.shards[name]
    if not path.is_file():
        return Fault(name, "missing")
    size = path.stat().st_size
    if size != written["bytes"]:
        how = "cut short" if size < written["bytes"] else "too long"
        return Fault(name, f"{how}: {size:,} bytes of {written['bytes']:,}")
    segments = folder.segments(name)
    try:
        with path.open("rb") as file:
            sha256, sums = _sums(file, segments or [Segment(size, 0)], advance)
    except OSError as error:
        return Fault(name, f"cannot be read: {error.strerror}")
    wrong = [n for n, segment in enumerate(segments) if sums[n] != segment.crc32]
    if not wrong and sha256 == written["sha256"]:
        return _wrong_values(folder, name)
    last = len(segments) - 1
    batches = tuple(n - 1 for n in wrong if 0 < n < last)
    parts = [f"record batch {n}" for n in batches]
    if len(segments) == 1 or not wrong:  # of one piece, or the two checksums disagree
        parts = ["its checksum differs"]
    elif len(batches) < len(wrong):
        parts.append("what frames the record batches")
    return Fault(name, f"damaged: {', '.join(parts)}", batches)


def _wrong_values(folder: StageFolder, name: str) -> Fault | None:
    """What is wrong with a shard whose checksums are right: values that no stage writes."""
    if not name.endswith(SHARD_SUFFIX):
        return None
    try:
        layout = fused.sets_layout() if fused.is_sets(name) else _layout(folder)
        if layout is not None:
            Shard(folder, name, layout).check()
    except StoreError as error:
        return Fault(name, str(error).removeprefix(f"{folder.path / name} is "))
    return None


@lru_cache(maxsize=1)
def _layout(folder: StageFolder) -> Layout | None:
    """What the shards of a stage must be; None where that is not known.

    Of fused distributions it is known by their outcomes. Where these are damaged, that is said of
    their own file, and nothing of others that are whole.
    """
    stage = folder.identity.stage.partition("/")[0]
    if stage == "externalize":
        return externalized.layout_of(folder)
    if stage == "fuse":
        if any(fault_of(folder, name) for name in folder.shards if fused.is_sets(name)):
            return None
        return fused.layout_of(folder)
    return {"generate": ANSWERS, "corpus": BLOCKS, "evaluate": NATS}.get(stage)


def _sums(
    file: BinaryIO, segments: Sequence[Segment], advance: Callable[[int], object]
) -> tuple[str, list[int]]:
    """(SHA-256 of a file, CRC-32 of each of its segments), in one pass."""
    whole, sums = hashlib.sha256(), []
    for segment in segments:
        left, crc32 = segment.length, 0
        while left and (piece := file.read(min(left, _PIECE_BYTES))):
            whole.update(piece)
            crc32 = zlib.crc32(piece, crc32)
            left -= len(piece)
            advance(len(piece))
        sums.append(crc32)
    return whole.hexdigest(), sums


def repair(verified: Verified) -> list[str]:
    """Take the damaged files of a folder out of its manifest, so that its stage makes them anew.

    They are looked at again under the folder's lock: what has been made anew meanwhile stays.

    Returns:
        Names of what was taken out.

    Raises:
        StoreError: another process is writing in the folder, or this one may not.
    """
    if not verified.repairable:
        return []
    try:
        with StageWriter.open(verified.path, StageFolder(verified.path).identity) as folder:
            # Opening an unfinished folder takes out what is missing or of another size.
            gone = [name for name in verified.repairable if name not in folder.shards]
            left = [name for name in verified.repairable if name in folder.shards]
            still = [name for name in left if fault_of(folder, name) is not None]
            folder.forget(still)
    except OSError as error:
        raise StoreError(
            f"{verified.path} cannot be repaired: {error.strerror} ({error.filename}); make it "
            "writable first"
        ) from error
    return sorted(gone + still)
