"""The files that a model's weights are in, and their digests."""

import json
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache

from fusellm.errors import ModelError
from fusellm.store.files import file_digest

_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", "model.safetensors" + _INDEX)


def weight_files(
    model: str, place: str, commit: str | None, named: str | None = None
) -> dict[str, Path]:
    """Name and path of the files that transformers reads a model's weights from.

    Args:
        model: what the recipe calls it.
        place, commit: folder, or hub name and commit; looked up in the local cache.
        named: by its configuration, where that names its weights.

    Raises:
        ModelError: the files are not there.
    """

    def find(name: str) -> Path | None:
        if commit is None:
            path = Path(place, name)
            return path if path.is_file() else None
        found = try_to_load_from_cache(place, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    present = ((name, find(name)) for name in ([named] if named else _WEIGHTS))
    first, path = next(((n, path) for n, path in present if path is not None), (None, None))
    names = [] if first is None else [first]
    if path is not None and path.name.endswith(_INDEX):
        index = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    files = {name: find(name) for name in names}
    absent = [name for name, path in files.items() if path is None]
    if absent or not files:
        where = place
        if commit is not None:
            where = f"the local hub cache ({hub_constants.HF_HUB_CACHE}); load the model first"
        missing = ", ".join(absent[:3]) or " nor ".join(_WEIGHTS)
        raise ModelError(f"weights of {model}: no {missing} in {where}")
    return {name: path for name, path in files.items() if path is not None}


def cached_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read once as long as its size and time stay the same."""
    stat = path.stat()
    return _digest_at(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_at(path: Path, size: int, changed_ns: int) -> str:
    return file_digest(path)
