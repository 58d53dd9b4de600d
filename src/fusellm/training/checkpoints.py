"""Checkpoints on disk: which are whole, and which have been damaged since they were saved.

transformers writes a checkpoint's files one after another and syncs none. A file of ours is its
last, with the checksums of all others.
"""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from fusellm.errors import StoreError
from fusellm.progress import Progress
from fusellm.store.files import (
    file_digest,
    make_folder,
    require_inside,
    require_no_links,
    sync_files,
    write_text,
)
from fusellm.store.run_folder import SAVED_WHOLE
from fusellm.store.tables import folder_bytes
from fusellm.training import processes

_DAMAGED = "damaged-"  # before the name of a folder that is not gone on from


def seal(checkpoint: Path) -> None:
    """Have a checkpoint on disk before going on, and write down that it is, with its checksums.

    Raises:
        StoreError: it cannot be written.
    """
    sync_files(checkpoint)
    write_text(checkpoint / SAVED_WHOLE, json.dumps(_sums(checkpoint), indent=1) + "\n")


def last_checkpoint(checkpoints: Path, progress: Progress) -> str | None:
    """The last checkpoint that is what was saved.

    What a kill left of others is removed. A damaged one is renamed, and said.

    Args:
        checkpoints: folder of a run's checkpoints of one training, `RUN/train/fused-checkpoints`.

    Raises:
        StoreError: the folder cannot be made, or has links.
    """

    def last() -> str | None:
        require_inside(checkpoints, checkpoints.parents[1])
        require_no_links(checkpoints)
        make_folder(checkpoints)
        damaged = _set_damaged_aside(checkpoints, progress)
        newest = get_last_checkpoint(str(checkpoints))
        further = "begins anew" if newest is None else f"goes on from {newest}"
        for file, place in damaged:
            progress.say(
                f"{file} was damaged after it was saved: its checkpoint is kept as {place}, and "
                f"training {further}"
            )
        return None if newest is None else str(newest)

    return processes.first(last)


def _set_damaged_aside(checkpoints: Path, progress: Progress) -> list[tuple[Path, Path]]:
    """(the file that differs, new name of its folder) of each damaged checkpoint."""
    folders = []
    for folder in sorted(checkpoints.glob("checkpoint-*")):
        if (folder / SAVED_WHOLE).exists():
            folders.append(folder)
        else:
            shutil.rmtree(folder)
    damaged: list[tuple[Path, Path]] = []
    if not folders:
        return damaged
    megabytes = sum(folder_bytes(folder) for folder in folders) / 1e6
    with progress.start("verifying checkpoints", megabytes, "MB") as bar:
        for folder in folders:
            file = damaged_file(folder)
            bar.advance(folder_bytes(folder) / 1e6)
            if file is not None:
                place = folder.with_name(_DAMAGED + folder.name)
                shutil.rmtree(place, ignore_errors=True)
                folder.rename(place)
                damaged.append((file, place))
    return damaged


def damaged_file(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is not what was saved; None where all are.

    Of one that was saved before checksums were, nothing is known.
    """
    marker = checkpoint / SAVED_WHOLE
    try:
        saved = json.loads(marker.read_bytes() or b"{}")
    except (ValueError, RecursionError):
        return marker
    if not isinstance(saved, dict):
        return marker
    sums = _sums(checkpoint)
    return next((checkpoint / name for name in saved if saved[name] != sums.get(name)), None)


def require_intact(checkpoint: Path) -> None:
    """Check that a checkpoint is what was saved.

    Raises:
        StoreError: it is not.
    """
    damaged = damaged_file(checkpoint)
    if damaged is not None:
        raise StoreError(
            f"{damaged} was damaged after it was saved; remove {checkpoint}, and the same command "
            "goes on without it"
        )


def _sums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by their names, but for the one that says it is whole."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(checkpoint)): file_digest(path)
        for path in files
        if path.name != SAVED_WHOLE
    }
