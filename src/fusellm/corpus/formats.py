"""Reading files of records and of text, whatever they are packed with, a record at a time.

Memory is bounded by a record, or what a file of columns holds together, not by the file.
`datasets` reads such files too, but guesses one type a column from the first rows, and does not
count what is no UTF-8; what it is built on (pyarrow) unpacks and reads columns here.
"""

import codecs
import csv
import io
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from fusellm.corpus.fields import Fields, Spans
from fusellm.errors import CorpusError
from fusellm.tokens.blocks import cut_point
from fusellm.tokens.conversation import Conversation

_PACKED = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "xz": "xz"}
_BEGINS = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ"}
_RECORDS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
}
_TEXT = """
    txt text md markdown rst adoc org tex html htm xml yaml yml toml ini cfg
    c h cc hh cpp hpp cxx hxx cu cuh m mm cs java kt scala groovy go rs swift zig d f f90
    py pyi pyx js mjs jsx ts tsx css php rb pl pm lua r jl hs ml mli ex exs erl clj el lisp scm
    sh bash zsh ps1 sql proto cmake mk dockerfile v sv vhd asm s
"""
_FORMATS = _RECORDS | dict.fromkeys(_TEXT.split(), "text")

_BUFFER_BYTES = 1 << 20
_LOOKED_AT_BYTES = 1 << 16
_TEXT_BYTES = 1 << 23  # a longer text file is read as several documents
_ROWS = 32  # of columns that are read at once
_RECORD_BYTES = 1 << 26  # a longer record is refused: it may be a bomb
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, csv.Error)

_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_BETWEEN_VALUES = re.compile(r"[\s,\[\]]*")
_LONGEST_WORD = len(r"\ud83d\ude00")  # that JSON may be cut inside of
_NO_UTF8 = re.compile("[\udc80-\udcff]")


class FileKind(NamedTuple):
    """What a file is: its format, and what it is packed with."""

    format: str
    packed: str | None = None

    def __str__(self) -> str:
        return self.format + (f" ({self.packed})" if self.packed else "")


class FileRecord(NamedTuple):
    """One record, or what is read as one of a file of text.

    Attributes:
        text: of it.
        context: bytes of its text in UTF-8 that a model is not asked to predict.
        is_utf8: whether all of its bytes were UTF-8; those that were not are U+FFFD.
        ends: whether the document ends with it.
        wanted: whether it is one that the entry asks for; of others the text is the label.
        conversation: that it is, if it is one; the text is what is learnt of it.
        unusable: why it is none, where it was to be one.
        prompt: what a model is to answer, where one is; the text is then what the record answers
            itself, if it does.
    """

    text: str
    context: Spans = ()
    is_utf8: bool = True
    ends: bool = True
    wanted: bool = True
    conversation: Conversation | None = None
    unusable: str | None = None
    prompt: Conversation | str | None = None

    @classmethod
    def of(cls, fields: Fields, row: object, place: str, is_utf8: bool = True) -> "FileRecord":
        """A record by its fields.

        Raises:
            CorpusError: a field is missing, or holds no text.
        """
        label = fields.other_label(row, place)
        if label is not None:
            return cls(label, wanted=False)
        prompt = fields.prompt(row, place) if fields.are_prompts else None
        if fields.speech is None:
            has_text = not fields.are_prompts or fields.answers(row)
            text, context = fields.text(row, place) if has_text else ("", ())
            return cls(text, context, is_utf8, prompt=prompt)
        one = fields.conversation(row, place)
        if isinstance(one, str):
            return cls("", is_utf8=is_utf8, unusable=None if prompt else one, prompt=prompt)
        return cls(one.text, is_utf8=is_utf8, conversation=one, prompt=prompt)


def kind_of(path: Path, given: str | None = None) -> FileKind:
    """What a file is, by its ending in any case.

    Args:
        given: its format, where the recipe says it.

    Raises:
        CorpusError: the ending is not known.

    >>> str(kind_of(Path("part-07.JSONL.gz")))
    'jsonl (gzip)'
    """
    endings = [ending.removeprefix(".").lower() for ending in path.suffixes]
    packed = _PACKED.get(endings[-1]) if endings else None
    ending = "".join(endings[:-1][-1:] if packed else endings[-1:])
    format_ = given or _FORMATS.get(ending)
    if format_ is None:
        what = f"the ending .{ending} is not known" if ending else "no ending says what it is"
        raise CorpusError(
            f"corpus.documents: {path}: {what}; known: {', '.join(_RECORDS)}, text (txt, md, "
            f"source code), each also with .{', .'.join(_PACKED)}. Leave it out of files, or give "
            "the entry a format: text, say"
        )
    return FileKind(format_, packed)


def read_records(path: Path, kind: FileKind, fields: Fields) -> Iterator[FileRecord]:
    """The records of a file, in order.

    Raises:
        CorpusError: the file is damaged or not of its kind, or a record lacks a field.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise CorpusError(
                    f"{path} is a pointer of Git LFS and not the file; `git lfs pull` fetches it"
                )
        if kind.format in _OF_COLUMNS:
            yield from _unpacked(path, kind, fields)
            return
        with _opened(path, kind.packed) as stream:
            _require_text(path, stream)
            yield from _OF_LINES[kind.format](stream, path, fields)
    except _UNREADABLE as error:
        if kind.packed is not None and not _is_packed(path, kind.packed):
            raise CorpusError(
                f"{path} is not packed, though its name says so ({kind.packed}); take that ending "
                "off, or fetch it anew"
            ) from error
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise CorpusError(
            f"{path} cannot be read as {kind}: {reason}; fetch or make it anew, or leave it out "
            "of files"
        ) from error


def _is_packed(path: Path, packed: str) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(_BEGINS[packed])


def _opened(path: Path, packed: str | None) -> io.BufferedReader:
    if packed == "xz":  # the one that pyarrow has not
        return io.BufferedReader(lzma.open(path), _BUFFER_BYTES)
    return io.BufferedReader(pa.input_stream(path, compression=packed), _BUFFER_BYTES)


def _require_text(path: Path, stream: io.BufferedReader) -> None:
    head = stream.peek(_LOOKED_AT_BYTES)[:_LOOKED_AT_BYTES]
    odd = head.decode("utf-8", "replace").count("\ufffd") + len(_CONTROL.findall(head))
    if head.startswith(_UTF16) or odd > 16 + 0.3 * len(head):
        raise CorpusError(
            f"{path} is no text in UTF-8: {odd} of its first {len(head)} bytes cannot be. Give it "
            "the ending of what it is, convert it (iconv -t UTF-8), or leave it out of files"
        )


class _Utf8:
    """Decodes bytes, and remembers whether all were UTF-8."""

    def __init__(self) -> None:
        self._good = True

    def decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._good = False
            return data.decode("utf-8", "replace")

    def was_good(self) -> bool:
        """Whether all was since it was last asked."""
        good, self._good = self._good, True
        return good


# Text


def _text(stream: BinaryIO, path: Path, fields: Fields) -> Iterator[FileRecord]:
    if fields.are_named:
        key = "context_fields" if fields.context else "where" if fields.where else fields.key
        raise CorpusError(
            f"{path} is text without fields, and {key} names some; leave it out of files"
        )
    if fields.are_prompts:
        raise CorpusError(
            f"{path} is text without fields, and generated asks for prompts, one a record; give "
            "them as jsonl, or leave it out of files"
        )
    utf8 = _Utf8()
    rest = b""
    while True:
        data = rest + stream.read(_TEXT_BYTES + 1 - len(rest))
        at = len(data) if len(data) <= _TEXT_BYTES else cut_point(data[:-1], data[-1])
        rest = data[at:]
        yield FileRecord(utf8.decode(data[:at]), (), utf8.was_good(), not rest)
        if not rest:
            return


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(_RECORD_BYTES + 1):
        number += 1
        if len(line) > _RECORD_BYTES:
            raise _too_long(f"{path}:{number}")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _too_long(place: str) -> CorpusError:
    return CorpusError(
        f"{place} is longer than {_RECORD_BYTES >> 20} MiB, the longest record that is read; cut "
        "it into several documents"
    )


def _jsonl(stream: BinaryIO, path: Path, fields: Fields) -> Iterator[FileRecord]:
    utf8 = _Utf8()
    for number, line in enumerate(_lines(stream, path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                row = json.loads(utf8.decode(line))
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{place} is not JSON: {error}; mend or drop the line") from None
            yield FileRecord.of(fields, row, place, utf8.was_good())


def _json(stream: BinaryIO, path: Path, fields: Fields) -> Iterator[FileRecord]:
    """Objects in a list, one after another, or one alone."""
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, at, number, lists, more = "", 0, 0, 0, True
    while more:
        data = stream.read(max(_BUFFER_BYTES, len(text) - at))
        more = bool(data)
        text, at = text[at:] + decode(data, not more), 0
        while True:
            between = _BETWEEN_VALUES.match(text, at)
            assert between is not None
            lists += between[0].count("[") - between[0].count("]")
            at = between.end()
            if at == len(text):
                break
            place = f"{path}, record {number}"
            try:
                row, end = scan(text, at)
            except (ValueError, RecursionError) as error:
                if more and _is_cut(error, text):
                    if len(text) - at > _RECORD_BYTES:
                        raise _too_long(place) from None
                    break  # the rest of it is still to be read
                # Without the place, which is one in what is read at once.
                fault = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise CorpusError(f"{place}, is not JSON: {fault}; mend or drop it") from None
            is_utf8 = _NO_UTF8.search(text, at, end) is None
            if not is_utf8:
                row = json.loads(_with_marks(text[at:end]))
            yield FileRecord.of(fields, row, place, is_utf8)
            at, number = end, number + 1
    if lists:
        raise CorpusError(f"{path} ends inside a list: it is cut off; fetch or make it anew")


def _is_cut(error: Exception, text: str) -> bool:
    """Whether JSON could be right if the text went on: its fault is at the end, or a string's."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos > len(text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")


def _with_marks(text: str) -> str:
    """Text whose bytes that were no UTF-8 are U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _csv(stream: BinaryIO, path: Path, fields: Fields, delimiter: str) -> Iterator[FileRecord]:
    csv.field_size_limit(_RECORD_BYTES)
    utf8 = _Utf8()
    rows = csv.reader(map(utf8.decode, _lines(stream, path)), delimiter=delimiter, strict=True)
    names = next(rows, [])
    for row in rows:
        place = f"{path}:{rows.line_num}"
        if row and len(row) != len(names):
            raise CorpusError(
                f"{place} has {len(row)} fields, and the first line {len(names)}; mend the line"
            )
        if row:
            values = dict(zip(names, row, strict=True))
            yield FileRecord.of(fields, values, place, utf8.was_good())


# Columns


def _unpacked(path: Path, kind: FileKind, fields: Fields) -> Iterator[FileRecord]:
    """The records of a file of columns, which is not read from its beginning to its end."""
    read = _OF_COLUMNS[kind.format]
    if kind.packed is None:
        yield from read(path, path, fields)
        return
    with tempfile.NamedTemporaryFile() as whole, _opened(path, kind.packed) as stream:
        shutil.copyfileobj(stream, whole)
        whole.flush()
        yield from read(Path(whole.name), path, fields)


def _parquet(place: Path, path: Path, fields: Fields) -> Iterator[FileRecord]:
    with pyarrow.parquet.ParquetFile(place, buffer_size=_BUFFER_BYTES) as file:
        _require_columns(file.schema_arrow, path, fields)
        there = [name for name in fields.columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=_ROWS, columns=there):
            yield from _rows(batch, path, fields)


def _arrow(place: Path, path: Path, fields: Fields) -> Iterator[FileRecord]:
    with pa.memory_map(str(place)) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:
            stream = pa.ipc.open_stream(file)
            _require_columns(stream.schema, path, fields)
            batches: Iterator[Any] = iter(stream)
        else:
            whole = pa.ipc.open_file(file)
            _require_columns(whole.schema, path, fields)
            batches = map(whole.get_batch, range(whole.num_record_batches))
        for batch in batches:
            yield from _rows(batch, path, fields)


def _require_columns(schema: pa.Schema, path: Path, fields: Fields) -> None:
    for name in fields.columns:
        labels = [label for label, _ in fields.where]
        key = "where" if name in labels and name not in fields.names else fields.key
        if name not in schema.names:
            if name in fields.may_be_missing:
                continue
            raise CorpusError(
                f"{path} has no column {name!r}; it has {', '.join(schema.names)} (set {key})"
            )
        if fields.speech is None and name in fields.names and not _is_text(schema.field(name).type):
            raise CorpusError(
                f"{path}: column {name!r} holds {schema.field(name).type} and no text; set "
                "text_field"
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _rows(batch: pa.RecordBatch, path: Path, fields: Fields) -> Iterator[FileRecord]:
    if fields.speech is not None:
        batch = batch.select([name for name in fields.columns if name in batch.schema.names])
        batch.validate(full=True)  # so that what it points at is its own
        if batch.nbytes > _RECORD_BYTES and batch.num_rows == 1:
            raise _too_long(f"a record of {path}")
        for row in batch.to_pylist():
            yield FileRecord.of(fields, row, str(path))
        return
    utf8 = _Utf8()
    labels = [name for name, _ in fields.where if name not in fields.names]
    for name in labels:
        batch.column(name).validate(full=True)
    of_label = [batch.column(name).to_pylist() for name in labels]
    names = [name for name in fields.names if name in batch.schema.names]
    columns = (_as_bytes(batch.column(name)) for name in names)
    for n, values in enumerate(zip(*columns, strict=True)):
        texts = [value.as_py() for value in values]
        if sum(len(text or b"") for text in texts) > _RECORD_BYTES:
            raise _too_long(f"a record of {path}")
        row = {
            name: None if text is None else utf8.decode(text)
            for name, text in zip(names, texts, strict=True)
        }
        told = {name: column[n] for name, column in zip(labels, of_label, strict=True)}
        yield FileRecord.of(fields, told | row, str(path), utf8.was_good())


def _as_bytes(column: pa.Array) -> pa.Array:
    """A column of text as bytes, after a check that it points nowhere outside of its own."""
    unchecked = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    if column.type in unchecked:  # what is no UTF-8 is counted, not refused
        column = column.view(unchecked[column.type])
    column.validate(full=True)
    return column.cast(pa.large_binary())


_Reader = Callable[[BinaryIO, Path, Fields], Iterator[FileRecord]]
_OF_LINES: dict[str, _Reader] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": partial(_csv, delimiter=","),
    "tsv": partial(_csv, delimiter="\t"),
}
_OF_COLUMNS: dict[str, Callable[[Path, Path, Fields], Iterator[FileRecord]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
}
