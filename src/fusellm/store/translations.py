"""Vocabulary maps on disk: made once for a pair of tokenizers, whatever the run.

In the user's cache folder (`FUSELLM_CACHE`, else `$XDG_CACHE_HOME/fusellm`, else
`~/.cache/fusellm`), one file a strategy and pair, under both fingerprints. Nothing depends on the
files being there.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from fusellm.align.translation import Translation
from fusellm.errors import StoreError
from fusellm.store.files import write_whole

_VERSION = 1  # of how maps are made: another one makes all anew


def cache_folder() -> Path:
    """Where maps are kept."""
    chosen = os.environ.get("FUSELLM_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusellm"


def cached_translation(
    strategy: str, source: str, target: str, make: Callable[[], Translation]
) -> Translation:
    """The map of a strategy for two tokenizers, read or made and kept.

    A file that cannot be read is made anew; a folder that cannot be written to is passed over.

    Args:
        source, target: fingerprints of the tokenizers.
    """
    path = cache_folder() / "maps" / f"{strategy}-{source[:24]}-{target[:24]}-v{_VERSION}.npz"
    found = _read(path)
    if found is None:
        found = make()
        _keep(path, found)
    return found


def _read(path: Path) -> Translation | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Translation(
                arrays["outcome_of_source"],
                arrays["outcome_of_target"],
                int(arrays["outcomes"]),
                bool(arrays["complete"]),
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _keep(path: Path, made: Translation) -> None:
    arrays = {
        "outcome_of_source": made.outcome_of_source,
        "outcome_of_target": made.outcome_of_target,
        "outcomes": np.array(made.outcomes),
        "complete": np.array(made.complete),
    }
    own = path.with_name(f"{os.getpid()}-{path.name}")  # another process may be writing it too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(own, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
        own.replace(path)
    except (OSError, StoreError):
        with suppress(OSError):
            own.unlink()
