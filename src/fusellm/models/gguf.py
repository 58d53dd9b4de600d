"""The header of a GGUF file: its metadata and tensors, and what cannot be read here.

GGUF is llama.cpp's format: one file with the weights, often quantized, and with a tokenizer.
The header is read without the weights, in about a second. The `gguf` package is an extra, so that
it is imported where it is used.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations import gguf as gguf_tables
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from fusellm.errors import ModelError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# Types of values, by their numbers in a file.
_STRING, _ARRAY = 8, 9
_SCALARS = "BbHhIif?__Qqd"  # "_": strings and arrays, which are no scalars
# What transformers calls architectures that llama.cpp names otherwise.
_ALIASES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
_NOT_ARCHITECTURES = {"general", "tokenizer"}  # blocks of transformers' table
_NOT_DECODERS = {"t5", "t5encoder", "umt5"}
_FOLDER = "give the model as a folder of safetensors"


@dataclass(frozen=True)
class Value:
    """One entry of the metadata.

    Attributes:
        kind: number of its type in the file; of an array, that of its elements.
    """

    value: Any
    kind: int


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is.

    Attributes:
        kind: number of its (quantization) type.
        shape: elements in each dimension, the fastest first: [columns, rows].
        start: of its bytes, after the header.
    """

    kind: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights."""

    path: Path
    fields: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self.fields.get(key)
        return default if field is None else field.value

    @property
    def architecture(self) -> str:
        """As llama.cpp names it."""
        return str(self.get("general.architecture", "unknown"))

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own part of the metadata."""
        return self.get(f"{self.architecture}.{key}", default)

    @property
    def rows(self) -> int | None:
        """Rows of the embedding, which the head has too."""
        embedding = self.tensors.get("token_embd.weight")
        return None if embedding is None else embedding.shape[-1]


def require_gguf(name: str) -> None:
    """Check that the package that reads GGUF files is installed.

    Raises:
        ModelError: it is not; the message has the command that installs it.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"{name} needs the package gguf: pip install 'fusellm[gguf]'")


def model_header(path: Path) -> GgufHeader:
    """The header of a file whose model can be loaded.

    Raises:
        ModelError: it is no GGUF file, or damaged, or one part of several, or it holds something
            else than a language model, or one that transformers cannot dequantize.
    """
    require_gguf(str(path))
    part = _SPLIT.search(path.name)
    if part is not None and int(part[2]) > 1:
        raise _split(path, f"part {int(part[1])} of {int(part[2])} of a model")
    header = read_header(path)
    if (parts := header.get("split.count", 0)) > 1:
        raise _split(path, f"one of {parts} parts of a model")
    _require_language_model(header)
    _require_architecture(header)
    _require_whole(header)
    return header


def read_header(path: Path) -> GgufHeader:
    """A file's header, read once as long as its size and time stay the same.

    Raises:
        ModelError: it is no GGUF file, or its header is cut off.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed_ns: int) -> GgufHeader:
    if size < 24:
        raise ModelError(f"{path} is no GGUF file: it has {size} bytes; check the download")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise ModelError(
                f"{path} is no GGUF file: it begins with {data[:4]!r}, not {_MAGIC!r}; check the "
                "download"
            )
        (version,) = struct.unpack_from("<I", data, 4)
        if version not in _VERSIONS:
            raise ModelError(
                f"{path} is GGUF of version {version}, and versions 2 and 3 with little-endian "
                "numbers are read here; convert the model anew with a recent llama.cpp"
            )
        try:
            return _Parser(data).header(path)
        except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
            raise _damaged(path, f"its header ends too early or is no header ({error})") from error


class _Parser:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 8

    def header(self, path: Path) -> GgufHeader:
        tensor_count, field_count = self._numbers("<QQ")
        fields = {}
        for _ in range(field_count):
            key = self._string()
            (kind,) = self._numbers("<I")
            fields[key] = self._value(kind)
        tensors = {}
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._numbers("<I")
            shape = self._numbers(f"<{dimensions}Q")
            kind, offset = self._numbers("<IQ")
            tensors[name] = Tensor(kind, shape, offset)
        alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
        begin = -(-self._at // alignment) * alignment
        placed = {n: Tensor(t.kind, t.shape, begin + t.start) for n, t in tensors.items()}
        return GgufHeader(path, fields, placed)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return Value(self._string(), kind)
        if kind == _ARRAY:
            inner, count = self._numbers("<IQ")
            if inner == _STRING:
                return Value([self._string() for _ in range(count)], inner)
            return Value(list(self._numbers(f"<{count}{_scalar(inner)}")), inner)
        return Value(self._numbers(f"<{_scalar(kind)}")[0], kind)

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        begin = self._at + 8
        if begin + length > len(self._data):
            raise ValueError(f"a string of {length} bytes at byte {begin}")
        self._at = begin + length
        # llama.cpp takes any bytes; a token that is no UTF-8 must stay another token.
        return self._data[begin : self._at].decode("utf-8", "surrogateescape")

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        numbers = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return numbers


def _scalar(kind: int) -> str:
    letter = _SCALARS[kind] if kind < len(_SCALARS) else "_"
    if letter == "_":
        raise ValueError(f"a value of the unknown type {kind}")
    return letter


def _require_language_model(header: GgufHeader) -> None:
    architecture, kind = header.architecture, str(header.get("general.type", "model"))
    keys = ("clip.", f"{architecture}.vision.")
    if architecture == "clip" or kind == "mmproj" or any(k.startswith(keys) for k in header.fields):
        raise ModelError(
            f"{header.path} holds the vision part of a model ({architecture}, {kind}); give the "
            "file of its language model, whose name has no mmproj"
        )
    if kind != "model":
        raise ModelError(
            f"{header.path} holds no model but {kind!r} (general.type); give the model's own file"
        )


def _require_architecture(header: GgufHeader) -> None:
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *_new_architectures()} - _NOT_ARCHITECTURES
    name = header.architecture
    if name in _NOT_DECODERS:
        raise ModelError(f"{header.path} is a {name}, which is no decoder-only language model")
    if name not in known and _ALIASES.get(name) not in known:
        have = ", ".join(sorted(known - _NOT_DECODERS))
        raise ModelError(
            f"{header.path} has the architecture {name!r}, which transformers does not dequantize "
            f"(it does {have}); {_FOLDER}"
        )


def _new_architectures() -> set[str]:
    """Those that transformers reads by its newer table, where it has one."""
    return set(getattr(gguf_tables, "GGUF_ARCHS", ()))


def _require_whole(header: GgufHeader) -> None:
    """Check that all weights are in the file, of types that can be dequantized."""
    import gguf

    size = header.path.stat().st_size
    if not header.tensors:
        raise ModelError(f"{header.path} has no weights, a vocabulary at most; {_FOLDER}")
    sizes = {}
    for kind in {tensor.kind for tensor in header.tensors.values()}:
        try:
            known = gguf.GGMLQuantizationType(kind)
            sizes[kind] = gguf.GGML_QUANT_SIZES[known]
            gguf.dequantize(np.zeros((1, sizes[kind][1]), np.uint8), known)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise ModelError(
                f"{header.path} has weights of the quantization {kind}, which this version of "
                f"the package gguf cannot dequantize ({error}); pip install --upgrade gguf, or "
                f"{_FOLDER}"
            ) from error
    for name, tensor in header.tensors.items():
        per_block, block_bytes = sizes[tensor.kind]
        length = math.prod(tensor.shape) // per_block * block_bytes
        if tensor.start + length > size:
            raise _damaged(header.path, f"{name} ends at byte {tensor.start + length} of {size}")


def _split(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path} is {what} in a split GGUF; join them first with llama.cpp's `gguf-split --merge "
        "FIRST-PART.gguf WHOLE.gguf`"
    )


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is truncated or damaged: {why}; download it again")
