"""Vocabulary maps on disk: made once for a pair of tokenizers, whatever the run.

In the user's cache folder (`FUSELLM_CACHE`, else `$XDG_CACHE_HOME/fusellm`, else
`~/.cache/fusellm`), one file a strategy and pair, under both fingerprints. Nothing depends on the
files being there.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fusellm.alignment.translation import VocabularyMap
from fusellm.errors import StoreError
from fusellm.store.files import write_whole

_VERSION = 1  # of how maps are made: another one makes all anew


def cache_folder() -> Path:
    """Where maps are kept, and digests of large files."""
    chosen = os.environ.get("FUSELLM_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusellm"


def cached_translation(
    strategy: str,
    source: str,
    target: str,
    sizes: tuple[int, int],
    make: Callable[[], VocabularyMap],
) -> VocabularyMap:
    """The map of a strategy for two tokenizers, read or made and kept.

    A file that cannot be read, or holds what no map can, is made anew; a folder that cannot be
    written to is passed over.

    Args:
        source, target: fingerprints of the tokenizers.
        sizes: (Vs, Vt) of their vocabularies.
    """
    path = (
        cache_folder() / "maps" / f"{strategy}-{source[:24]}-{target[:24]}-v{_VERSION}.safetensors"
    )
    translation = _read(path, sizes)
    if translation is None:
        translation = make()
        _keep(path, translation)
    return translation


def _read(path: Path, sizes: tuple[int, int]) -> VocabularyMap | None:
    """A map that was kept; None where there is none, or where it is no map of these sizes.

    Its numbers become indices of compiled loops, which check none.
    """
    try:
        arrays = load(path.read_bytes())
        maps = arrays["outcome_of_source"], arrays["outcome_of_target"]
        outcomes, complete = arrays["outcomes"], arrays["complete"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    every = (*maps, outcomes, complete)
    if [array.dtype for array in every] != [np.int64, np.int64, np.int64, np.bool_]:
        return None
    if [array.shape for array in every] != [(sizes[0],), (sizes[1],), (), ()]:
        return None
    most = int(outcomes)
    both = np.concatenate(maps)
    if not 0 <= most <= len(both) or not ((both >= -1) & (both < most)).all():
        return None
    return VocabularyMap(both[: sizes[0]], both[sizes[0] :], most, bool(complete))


def _keep(path: Path, made: VocabularyMap) -> None:
    arrays = {
        "outcome_of_source": made.outcome_of_source,
        "outcome_of_target": made.outcome_of_target,
        "outcomes": np.array(made.outcomes),
        "complete": np.array(made.complete),
    }
    own = path.with_name(f"{os.getpid()}-{path.name}")  # another process may be writing it too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(own, lambda file: file.write(save(arrays)))
        own.replace(path)
    except (OSError, StoreError):
        with suppress(OSError):
            own.unlink()
