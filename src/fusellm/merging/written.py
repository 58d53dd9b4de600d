"""A merged model's folder: there whole or not at all, its weights written tensor by tensor.

safetensors' own writer takes a file's tensors all at once. A file is the length of its header in 8
bytes, the header in JSON, and the numbers of each tensor one after another, so that it can be
written with one tensor in memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from fusellm.errors import StoreError
from fusellm.models.headers import TensorHeader
from fusellm.models.weights import INDEX
from fusellm.store.files import require_writable, sync_files, sync_folder
from fusellm.store.writer import take_lock

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
BYTES |= {"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Of an entry, by its type as safetensors spells it."""
_ALIGNED = 8
_LENGTH_BYTES = 8
Plan = Mapping[str, Mapping[str, TensorHeader]]
"""The tensors of each file."""


def size_of(header: TensorHeader) -> int:
    """Bytes of a tensor.

    >>> size_of(TensorHeader("BF16", (3, 4)))
    24
    """
    return BYTES[header.dtype] * torch.Size(header.shape).numel()


def require_free(out: Path) -> Path:
    """Check that a folder can be made at a place, where there is none or an empty one.

    Returns:
        The place without links.

    Raises:
        StoreError: something is there, or it cannot be written to.
    """
    place = Path(os.path.realpath(out.expanduser()))
    if place.is_dir() and any(place.iterdir()):
        raise StoreError(
            f"{out} is there already and is not empty; give another --out, or remove it first"
        )
    if place.exists() and not place.is_dir():
        raise StoreError(f"{out} is a file; give the name of a folder as --out")
    require_writable(place.parent)
    return place


def require_room(place: Path, plan: Plan) -> None:
    """Check that a model fits on the disk.

    Raises:
        StoreError: it does not.
    """
    above = next(path for path in place.parents if path.exists())
    needed = sum(size_of(header) for file in plan.values() for header in file.values())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise StoreError(
            f"the merged model needs {needed / 1e9:.1f} GB and {above} has {free / 1e9:.1f} GB "
            "free; free some space, or give another --out"
        )


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A folder to write in that gets its name in the end, when all of it is on disk.

    After an error or a signal nothing is left. What a kill leaves is hidden beside the place, and
    goes with the next attempt.

    Raises:
        StoreError: another process is writing it, or it cannot be written.
    """
    hidden = place.with_name(f".{place.name}.merging")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError as error:
        raise _not_written(hidden, error) from error
    try:
        take_lock(lock, place)
        try:
            _empty(hidden)
            yield hidden
            sync_files(hidden)
            hidden.rename(place)  # onto nothing, or onto an empty folder
            sync_folder(place.parent)
        except OSError as error:
            raise _not_written(place, error) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    finally:
        os.close(lock)


def _not_written(place: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{place} could not be written ({error.strerror or error}), and nothing of it is left; "
        "mend that, or give another --out"
    )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_weights(folder: Path, plan: Plan, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write the weights of a model, and the index where they are in several files.

    Args:
        tensor_of: gives a tensor by its name, in the type and shape that the plan says; it is
            asked for each once, and none is kept.
    """
    for name, tensors in plan.items():
        write_file(folder / name, tensors, tensor_of)
    if len(plan) == 1:
        return
    total = sum(size_of(header) for tensors in plan.values() for header in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted((t, name) for name, tensors in plan.items() for t in tensors)),
    }
    text = json.dumps(index, indent=2, ensure_ascii=False)
    (folder / f"model.safetensors{INDEX}").write_text(text + "\n", encoding="utf-8")


def write_file(
    path: Path, tensors: Mapping[str, TensorHeader], tensor_of: Callable[[str], torch.Tensor]
) -> None:
    """Write one safetensors file, a tensor at a time.

    Format: https://huggingface.co/docs/safetensors. The widest types stand first, so that every
    tensor begins at a multiple of its width.
    """
    names = sorted(tensors, key=lambda name: (-BYTES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + size_of(tensors[name])
        said = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape)}
        header[name] = said | {"data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % _ALIGNED)
    with path.open("xb") as file:
        file.write(len(head).to_bytes(_LENGTH_BYTES, "little"))
        file.write(head)
        for name in names:
            _write(file, tensor_of(name), size_of(tensors[name]))


def _write(file: BinaryIO, values: torch.Tensor, size: int) -> None:
    numbers = values.contiguous().flatten().view(torch.uint8)
    assert numbers.numel() == size, "of the type and shape that the header says"
    file.write(numbers.numpy().data)
