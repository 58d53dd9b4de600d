"""The files that a model's weights are in, and their digests."""

from functools import lru_cache
from pathlib import Path, PurePosixPath

from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache

from fusellm.errors import ModelError
from fusellm.store.files import file_digest, from_json

INDEX = ".index.json"
"""How the name of a file ends that says which tensor is in which shard."""
_WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX)
_POINTER, _POINTER_BYTES = b"version https://git-lfs", 1024


def weight_files(
    model: str, place: str, commit: str | None, named: str | None = None
) -> dict[str, Path]:
    """Name and path of the files that transformers reads a model's weights from, without the index.

    Args:
        model: what the recipe calls it.
        place, commit: folder, or hub name and commit; looked up in the local cache.
        named: by its configuration, where that names its weights.

    Raises:
        ModelError: the files are not there, or the index names one outside of the folder.
    """
    files = loaded_files(model, place, commit, named)
    return {name: path for name, path in files.items() if not name.endswith(INDEX)}


def loaded_files(
    model: str, place: str, commit: str | None, named: str | None = None
) -> dict[str, Path]:
    """`weight_files`, and their index where they have one."""

    def find(name: str) -> Path | None:
        if commit is None:
            path = Path(place, name)
            return path if path.is_file() else None
        cached = try_to_load_from_cache(place, name, revision=commit)
        return Path(cached) if isinstance(cached, str) else None

    present = ((name, find(name)) for name in ([named] if named else _WEIGHTS))
    first, path = next(((n, path) for n, path in present if path is not None), (None, None))
    names = [] if first is None else [first]
    if path is not None and path.name.endswith(INDEX):
        names += sorted(set(read_index(model, path).values()))
    files = {name: find(name) for name in names}
    absent = [name for name, path in files.items() if path is None]
    if absent or not files:
        where = place
        if commit is not None:
            where = f"the local hub cache ({hub_constants.HF_HUB_CACHE}); load the model first"
        missing = ", ".join(absent[:3]) or " nor ".join(_WEIGHTS)
        raise ModelError(f"weights of {model}: no {missing} in {where}")
    return {name: path for name, path in files.items() if path is not None}


def read_index(model: str, path: Path) -> dict[str, str]:
    """The shard of each tensor.

    Raises:
        ModelError: it cannot be read, or names a file outside of its folder.
    """
    require_content(model, path)
    try:
        shards = from_json(path.read_text(encoding="utf-8"))["weight_map"]
        by_tensor = {str(tensor): str(shard) for tensor, shard in shards.items()}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path.name} of {model} does not say which tensor is in which file ({error!r}); fetch "
            "it again"
        ) from error
    for shard in by_tensor.values():
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts:
            raise ModelError(
                f"{path.name} of {model} names a file outside of its folder ({shard}); a model is "
                "read from its own folder alone"
            )
    return by_tensor


def require_content(model: str, path: Path) -> None:
    """Check that a file, if there is one, is not what Git puts in the place of a large one.

    Raises:
        ModelError: it is; the message has the command that fetches it.
    """
    if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
        return
    if path.read_bytes().startswith(_POINTER):
        raise ModelError(
            f"{path.name} of {model} is a Git LFS pointer and not the file itself; fetch it: "
            f"git -C {path.parent} lfs pull"
        )


def cached_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read once as long as its size and time stay the same."""
    stat = path.stat()
    return _digest_at(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_at(path: Path, size: int, changed_ns: int) -> str:
    return file_digest(path)
