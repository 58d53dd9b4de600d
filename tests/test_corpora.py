"""Corpora as people have them: files of every kind, packed, damaged, linked, or one long one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm.cli.console import SafeConsole, Terminal
from fusellm.config import CorpusSettings, FileDocuments
from fusellm.corpus import digests, formats
from fusellm.corpus.cutting import write_corpus
from fusellm.corpus.documents import file_records
from fusellm.corpus.fields import Fields
from fusellm.corpus.formats import FileKind, FileRecord, kind_of
from fusellm.corpus.look import look_at
from fusellm.corpus.parts import PARTS
from fusellm.corpus.paths import files_of
from fusellm.errors import CorpusError, IdentityError
from fusellm.progress import Bar, Silent
from fusellm.recipe_file import check_recipe
from fusellm.stages.corpus import identity_of_corpus
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.files import file_digest
from fusellm.store.identity import digest
from fusellm.store.writer import StageWriter

TEXTS = [
    "one\ntwo, three",
    'naïve "café" Straße\r\n',
    "",
    "\u2028 数字;\ttab",
    "x" * 3000,
    "last\n",
]


def prose(seed: int, lines: int = 12) -> str:
    """Some text, another one for another seed."""
    return "".join(f"text {seed} has {n * (seed + 7)} words in line {n}\n" for n in range(lines))


class Spoken(Silent):
    """Keeps what is said, and the bars that are shown."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.bars: list[str] = []

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        self.bars.append(what)
        with super().start(what, total, unit) as bar:
            yield bar

    def say(self, message: str) -> None:
        self.said.append(message)


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("id", "body"), *enumerate(TEXTS)])
    return file.getvalue().encode()


def as_arrow(new: Callable[[Any, pa.Schema], Any]) -> bytes:
    table = pa.table({"id": range(len(TEXTS)), "body": TEXTS})
    file = io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return file.getvalue()


def as_parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"body": TEXTS, "id": range(len(TEXTS))}), file)
    return file.getvalue()


ROWS = [{"id": n, "body": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": as_csv(","),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(),
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(path: Path, **changes: Any) -> list[FileRecord]:
    entry = FileDocuments(files=str(path), **changes)
    return [record for _, record in file_records(entry)]


def texts(path: Path, **changes: Any) -> list[str]:
    return [record.text for record in read(path, **changes)]


def cut_up(
    folder: Path, entries: Sequence[dict[str, Any]], progress: Silent | None = None, **corpus: Any
) -> dict[str, list[Block]]:
    """The blocks of a corpus in each part; the run is `folder / "run"`."""
    shares = {"validation_share": 0.1, "held_out_share": 0.2, "block_bytes": 64}
    models = {"target": {"model": "zoo/prose"}, "sources": [{"name": "a", "model": "zoo/cpp"}]}
    settings_ = {"documents": list(entries)} | shares | corpus
    recipe = check_recipe({"name": "r", **models, "corpus": settings_}, "r")
    progress = progress or Silent()
    made_from = identity_of_corpus(recipe, "tokenizer", progress)
    with StageWriter.open(folder / "run" / "corpus", made_from, resume=False) as stage:
        if not stage.complete:
            write_corpus(recipe, stage, lambda text: len(text.split()) + 2, progress)
    stage = open_corpus(folder / "run")
    return {part: read_part(stage, part) for part in PARTS}


# What files are


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", FILES)
def test_records_are_the_same_whatever_they_are_in(tmp_path: Path, name: str, packed: str) -> None:
    data = PACK[packed](FILES[name])
    path = put(tmp_path, name + packed, data)
    assert texts(path, text_field="body") == TEXTS
    path = put(tmp_path, (name + packed).upper(), data)
    assert texts(path, text_field="body") == TEXTS


@pytest.mark.parametrize("name", FILES)
def test_only_records_with_a_label_are_read(tmp_path: Path, name: str) -> None:
    """Each keeps its own number, so that one label's documents are never another one's."""
    path = put(tmp_path, name, FILES[name])
    for n in (1, len(TEXTS) - 1):
        entry = FileDocuments(files=str(path), text_field="body", where={"id": n})
        assert [(one, record.text) for one, record in file_records(entry)] == [
            (f"{name}:{n}", TEXTS[n])
        ]
        corpus = {"documents": [{"files": str(path), "text_field": "body", "where": {"id": n}}]}
        (facts,) = look_at(CorpusSettings.model_validate(corpus), Silent())
        assert facts.first == TEXTS[n]
    assert texts(path, text_field="body", where={"body": TEXTS[2], "id": 2}) == [TEXTS[2]]
    with pytest.raises(CorpusError, match=r"no record of .* has id: 99; there are id: 0, id: 1"):
        texts(path, text_field="body", where={"id": 99})
    with pytest.raises(CorpusError, match=r"no (field|column) 'lang'.*where"):
        texts(path, text_field="body", where={"lang": "python"})


def test_a_label_may_be_true_or_a_number_that_others_write_otherwise(tmp_path: Path) -> None:
    rows = [{"text": "a", "ok": True, "n": 1.0}, {"text": "b", "ok": False, "n": None}]
    put(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    put(tmp_path, "a.csv", b"text,ok,n\na,True,1\nb,False,\n")
    put(tmp_path, "r.csv", b"text,ok,n\na,TRUE,1.0\nb,FALSE,\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "r.csv", "a.parquet"):
        for where in ({"ok": True}, {"n": 1}, {"n": 1.0}, {"n": "1"}, {"ok": True, "n": 1}):
            assert texts(tmp_path / name, where=where) == ["a"], (name, where)
        assert texts(tmp_path / name, where={"ok": False}) == ["b"]
    long = json.dumps({"text": "a\n" * 99}).encode()
    with pytest.raises(CorpusError, match=r"there are text: a a a a [a ]+…\. Set") as caught:
        texts(put(tmp_path, "long.jsonl", long), where={"text": "b"})
    assert "\n" not in str(caught.value)
    odd = pa.array([b"a\xff", b"b"]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": odd}), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet", where={"text": "b"}) == ["b"]


def test_a_label_gives_domains_and_no_other_corpus_changes(tmp_path: Path) -> None:
    rows = [{"text": f"{text} {n}", "lang": lang} for n, text in enumerate(TEXTS) for lang in "ab"]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put(tmp_path, "a.jsonl", data)
    entries = [
        {"files": str(tmp_path / "a.jsonl"), "where": {"lang": lang}, "domain": lang}
        for lang in "ab"
    ]
    parts = cut_up(tmp_path, entries, validation_share=0.3, held_out_share=0.3)
    blocks = [block for part in parts.values() for block in part]
    assert {block.domain for block in blocks} == {"a", "b"}
    numbers = {d: {b.document for b in blocks if b.domain == d} for d in "ab"}
    assert not numbers["a"] & numbers["b"]
    plain = FileDocuments(files="x", text_field="body")
    assert "where" not in plain.identity()
    assert FileDocuments(files="x", where={"a": 1}).identity()["where"] == {"a": 1}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.txt", "README.md", "b.PY", "c.h", "page.html"])
def test_text_is_one_document_a_file(tmp_path: Path, name: str, packed: str) -> None:
    path = put(tmp_path, name + packed, PACK[packed]("Straße\r\n\r\nx".encode()))
    assert read(path) == [FileRecord("Straße\r\n\r\nx")]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_what_was_packed_in_parts_is_read_to_its_end(tmp_path: Path, packed: str) -> None:
    data = b"".join(PACK[packed](line) for line in LINES.splitlines(keepends=True))
    assert texts(put(tmp_path, "a.jsonl" + packed, data), text_field="body") == TEXTS


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.dat", "the ending .dat is not known"),
        ("a.jsonl.zip", "the ending .zip is not known"),
        ("a.dat.gz", "the ending .dat is not known"),
        ("a.tar.gz", "the ending .tar is not known"),
        ("a.gz", "no ending says what it is"),
        ("README", "no ending says what it is"),
    ],
)
def test_an_unknown_ending_is_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    put(tmp_path, "b.jsonl", b'{"text": "b"}\n')
    path = put(tmp_path, name, PACK[".gz" if name.endswith(".gz") else ""](b"a text"))
    with pytest.raises(CorpusError, match=re.escape(f"{path}: {what}; known: jsonl, ")):
        look_at(
            CorpusSettings.model_validate({"documents": [{"files": f"{tmp_path}/*"}]}), Silent()
        )
    assert texts(path, format="text") == ["a text"]


RANDOM = bytes((n * n * 31 + n * 7 + n // 3) % 256 for n in range(5000))


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.txt", RANDOM, "is no text in UTF-8"),
        ("a.txt", bytes(4000), "is no text in UTF-8"),
        ("a.jsonl", gzip.compress(RANDOM, mtime=0), "is no text in UTF-8"),
        ("a.csv", "id,body\n1,text\n".encode("utf-16"), "is no text in UTF-8"),
        ("a.md", ("Съешь ещё этих булок " * 9).encode("cp1251"), "is no text in UTF-8"),
        ("a.json.gz", gzip.compress(RANDOM, mtime=0), "is no text in UTF-8"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, what: str
) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(CorpusError, match=what) as caught:
        look_at(CorpusSettings.model_validate({"documents": [{"files": str(path)}]}), Silent())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gz.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9]),
        ("bz2.jsonl.bz2", bz2.compress(LINES)[:-9]),
        ("xz.jsonl.xz", lzma.compress(LINES)[:-9]),
        ("zst.jsonl.zst", PACK[".zst"](LINES)[:-9]),
        ("named.jsonl.gz", LINES),
        ("cut.parquet", as_parquet()[:-9]),
        ("none.parquet", b"PAR1" + bytes(90)),
        ("none.parquet.gz", gzip.compress(b"PAR1" + bytes(90), mtime=0)),
        ("cut.arrow", FILES["file.arrow"][:-9]),
        ("half.arrow", FILES["stream.arrow"][: len(FILES["stream.arrow"]) // 2]),
        ("cut.jsonl", LINES[:-9]),
        ("cut.json", FILES["list.json"][:-9]),
        ("open.json", FILES["list.json"][:-1]),
        ("two.json", b'{"body": "a"} {"body" "b"}'),
        ("more.csv", FILES["a.csv"] + b"1,2,3\n"),
        ("open.csv", FILES["a.csv"] + b'1,"open\n'),
        ("deep.jsonl", b"[" * 100_000),
        ("deep.json", b'{"a":' * 100_000),
        ("list.jsonl", b'["body"]\n'),
        ("number.json", b"[1, 2]"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_path(tmp_path: Path, name: str, data: bytes) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(CorpusError) as caught:
        read(path, text_field="body")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_field_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a" + name, FILES[name])
    path = put(tmp_path, name, FILES[name].replace(b"body", b"text"))
    corpus = {"documents": [{"files": f"{tmp_path}/*", "text_field": "body"}]}
    with pytest.raises(CorpusError, match=r"'body'.*text_field") as caught:
        look_at(CorpusSettings.model_validate(corpus), Silent())
    assert str(path) in str(caught.value)


def test_a_column_of_numbers_and_text_with_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="column 'id' holds int64 and no text"):
        read(put(tmp_path, "a.parquet", as_parquet()), text_field="id")
    with pytest.raises(CorpusError, match="is text without fields, and text_field names some"):
        read(put(tmp_path, "a.txt", b"text"), text_field="body")
    with pytest.raises(CorpusError, match="is text without fields, and where names some"):
        read(put(tmp_path, "a.txt", b"text"), where={"lang": "python"})


@pytest.mark.parametrize(
    ("value", "kind"),
    [([{"role": "user"}], "a list"), ({"a": 1}, "an object"), (1.5, "a number"), (True, "true or")],
)
def test_a_field_that_holds_no_text_says_what_it_holds(
    tmp_path: Path, value: Any, kind: str
) -> None:
    path = put(tmp_path, "a.jsonl", json.dumps({"id": "a", "body": value}).encode() + b"\n")
    with pytest.raises(CorpusError, match=f"field 'body' holds {kind}.* and no text; set text_fi"):
        read(path, text_field="body")
    with pytest.raises(
        CorpusError, match=r"has no field 'text' \(it has: id, body\); set text_field"
    ):
        read(path)


def test_columns_of_every_type_of_text(tmp_path: Path) -> None:
    values = ["a", None, "b"]
    types = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    for kind in types:
        file = io.BytesIO()
        table = pa.table({"text": pa.array(values, pa.string()).cast(kind)})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        assert texts(put(tmp_path, "a.arrow", file.getvalue())) == ["a", "", "b"], kind


def test_a_column_that_points_outside_of_itself_is_refused(tmp_path: Path) -> None:
    column = pa.array(["some text", "more", "and more"])
    data = bytearray(as_ipc(column))
    at = data.index(column.buffers()[1].to_pybytes()[:16])
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(CorpusError, match="cannot be read as arrow"):
        read(put(tmp_path, "a.arrow", bytes(data)))


def as_ipc(column: pa.Array) -> bytes:
    file = io.BytesIO()
    table = pa.table({"text": column})
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('{"text": "a"}{"text": "b"}', ["a", "b"]),
        ('\ufeff{\n "text": "[a]"\n}\n', ["[a]"]),
        ("[]", []),
        ("", []),
    ],
)
def test_json_in_its_shapes(tmp_path: Path, text: str, found: list[str]) -> None:
    assert texts(put(tmp_path, "a.json", text.encode())) == found


def test_json_that_is_none_is_told_where_it_is_and_not_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_RECORD_BYTES", 2000)
    monkeypatch.setattr(formats, "_BUFFER_BYTES", 100)
    rows = ['{"text": "a"}', '{"text" "b"}', *['{"text": "c"}'] * 500]
    with pytest.raises(CorpusError, match="record 1, is not JSON: Expecting ':' delimiter"):
        texts(put(tmp_path, "a.json", ",".join(rows).encode()))


@given(
    found=st.lists(st.text(max_size=12), max_size=8),
    step=st.integers(1, 30),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_json_is_read_whatever_piece_comes_at_once(
    found: list[str], step: int, indent: int | None, is_ascii: bool
) -> None:
    rows = [{"text": text, "other": [[{"]": 1}]]} for text in found]
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    data = text.encode("utf-8", "replace")
    expected = [row["text"] for row in json.loads(data.decode())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BUFFER_BYTES", step)
        fields = Fields(("text",), frozenset(), "\n")
        records = formats._json(io.BytesIO(data), Path("a.json"), fields)
        assert [record.text for record in records] == expected


# Bytes that are no UTF-8


def damaged(name: str) -> bytes:
    """Three documents, of which the second holds a byte that is no UTF-8."""
    if name.endswith("txt"):
        return b"some text of latin \xe9tudes\n" * 9
    if name.endswith(("parquet", "arrow")):
        ends = pa.array([0, 4, 8, 12], pa.int32()).buffers()[1]
        column = pa.Array.from_buffers(
            pa.string(), 3, [None, ends, pa.py_buffer(b"goodca\xe9 good")]
        )
        file = io.BytesIO()
        if name.endswith("arrow"):
            return as_ipc(column)
        pyarrow.parquet.write_table(pa.table({"text": column}), file)
        return file.getvalue()
    if name.endswith("csv"):
        return b'text\ngood\n"ca\xe9"\ngood\n'
    return b'{"text": "good"}\n{"text": "ca\xe9"}\n{"text": "good"}\n'


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.json.gz"]
)
def test_bytes_that_are_no_utf8_are_counted_on_the_screen(tmp_path: Path, name: str) -> None:
    data = damaged(name)
    put(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    lines = "".join(json.dumps({"text": prose(n)}) + "\n" for n in range(40))
    put(tmp_path, "good.jsonl", lines.encode())
    entries = [{"files": str(tmp_path / name)}, {"files": str(tmp_path / "good.jsonl")}]
    spoken = Spoken()
    found = cut_up(tmp_path, entries, spoken)
    line = next(line for line in spoken.said if "no UTF-8" in line)
    number = 0 if name == "a.txt" else 1
    assert ": 1; the first is " in line
    assert f"{name}:{number}" in line
    assert open_corpus(tmp_path / "run").counts["documents_with_invalid_utf8"] == 1
    assert any("\ufffd" in block.text for part in found.values() for block in part)


# Where files are


def test_brackets_in_a_path_are_brackets_where_it_is_there(tmp_path: Path) -> None:
    place = tmp_path / "box [v2]" / "in {a}*"
    put(place, "a [1].jsonl", b"{}")
    put(tmp_path / "box v", "b.jsonl", b"{}")
    names = {
        "box [v2]/*/*.jsonl": [place / "a [1].jsonl"],
        "box [v2]/in {a}*/a [1].jsonl": [place / "a [1].jsonl"],
        "box [uvw]/*": [tmp_path / "box v" / "b.jsonl"],
        "**/*[1]*": [place / "a [1].jsonl"],
    }
    for pattern, found in names.items():
        assert files_of(FileDocuments(files=f"{tmp_path}/{pattern}")) == found, pattern


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "deep/x.txt", b"x")
    put(tmp_path / "data", "a.txt", b"a")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "twice").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "data" / "linked" / "deep" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "data" / "a.txt")
    for pattern in ("data/**/*.txt", "data/**", "data/**/**/*.txt"):
        found = files_of(FileDocuments(files=f"{tmp_path}/{pattern}"))
        names = [path.relative_to(tmp_path / "data").as_posix() for path in found]
        assert names == ["a.txt", "linked/deep/x.txt"]


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "environ.txt").symlink_to("/proc/self/environ")
    (tmp_path / "folder").mkdir()
    for pattern, what in {
        "pipe.*": "pipe.txt is no ordinary file",
        "lost.txt": "lost.txt cannot be read",
        "lost*": "lost.txt cannot be read",
        "environ.txt": "environ.txt is no ordinary file",
        "/proc/self/status": "/proc/self/status is no ordinary file",
        "/dev/null": "/dev/null is no ordinary file",
        "folder": r"it is a folder; .*folder/\*\*/\* stands for all files in it",
        "**.txt": "stands alone between slashes",
        "none.txt": "no file fits",
    }.items():
        with pytest.raises(CorpusError, match=what):
            files_of(FileDocuments(files=str(tmp_path / pattern)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    put(tmp_path, "shut/a.txt", b"a")
    (tmp_path / "shut").chmod(0)
    with pytest.raises(CorpusError, match="shut cannot be read"):
        files_of(FileDocuments(files=f"{tmp_path}/**/*.txt"))


# One long text


BOOK = "".join(f"Line {n} of a book, which has many.\n" for n in range(3000))


def test_one_long_text_is_cut_into_parts_by_place(tmp_path: Path) -> None:
    put(tmp_path, "book.txt", BOOK.encode())
    spoken = Spoken()
    entry = {"files": str(tmp_path / "book.txt"), "domain": "book"}
    found = cut_up(tmp_path, [entry], spoken)
    assert "".join(block.text for part in PARTS for block in found[part]) == BOOK
    sizes = {part: sum(len(block.text) for block in blocks) for part, blocks in found.items()}
    assert sizes["validation"] == pytest.approx(0.1 * len(BOOK), rel=0.02)
    assert sizes["held_out"] == pytest.approx(0.2 * len(BOOK), rel=0.02)
    ends = [(part, n) for part in PARTS for n, block in enumerate(found[part]) if block.last]
    assert ends == [("held_out", len(found["held_out"]) - 1)]
    # Pieces of 8 kB at most are documents of their own, as intervals need some.
    assert len({block.document for block in found["held_out"]}) >= sizes["held_out"] // 8192
    assert any("cut by place: 1" in line for line in spoken.said)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_texts_are_cut_by_place_together(tmp_path: Path, count: int) -> None:
    for n in range(count):
        put(tmp_path, f"{n}.txt", f"{n} {prose(n)}".encode())
    put(tmp_path, "blank.txt", b" \n")
    found = cut_up(tmp_path, [{"files": f"{tmp_path}/*.txt"}], validation_share=1e-6)
    assert all(found.values())
    whole = "".join(block.text for part in PARTS for block in found[part])
    assert whole == "".join(f"{n} {prose(n)}" for n in range(count))


def test_a_corpus_of_less_than_three_blocks_says_that_it_is_too_little(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", b"two lines\n" * 2)
    with pytest.raises(CorpusError, match="no text in its part validation; give it more text"):
        cut_up(tmp_path, [{"files": f"{tmp_path}/a.txt"}], block_bytes=16)


def test_documents_that_their_hashes_send_to_all_parts_are_not_cut_by_place(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} short"}) + "\n" for n in range(60))
    put(tmp_path, "a.jsonl", lines.encode())
    found = cut_up(tmp_path, [{"files": f"{tmp_path}/a.jsonl"}])
    assert all(
        block.last and "@" not in block.document for part in found.values() for block in part
    )


def test_context_stays_where_it_is_when_a_record_is_cut_by_place(tmp_path: Path) -> None:
    row = {"prompt": "Q" * 100, "answer": "A" * 300}
    put(tmp_path, "a.jsonl", json.dumps(row).encode())
    fields = {"text_field": ["prompt", "answer"], "context_fields": ["prompt"]}
    found = cut_up(tmp_path, [{"files": f"{tmp_path}/a.jsonl", **fields}])
    blocks = [block for part in PARTS for block in found[part]]
    context = "".join(block.text[a:b] for block in blocks for a, b in block.context)
    assert context == "Q" * 100 + "\n"


@pytest.mark.parametrize("budget", [{"train_bytes": 1000}, {"train_tokens": 200}])
def test_budgets_hold_to_a_block(tmp_path: Path, budget: dict[str, int]) -> None:
    put(tmp_path, "book.txt", BOOK.encode())
    train = cut_up(tmp_path, [{"files": f"{tmp_path}/book.txt"}], **budget)["train"]
    if "train_bytes" in budget:
        assert abs(sum(len(block.text) for block in train) - 1000) <= 64
    else:
        assert abs(sum(len(block.text.split()) + 2 for block in train) - 200) <= 64


def test_a_long_text_file_is_read_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_TEXT_BYTES", 1000)
    for text in (BOOK, "é" * 3000, "x" * 2000):
        records = read(put(tmp_path, "a.txt.gz", gzip.compress(text.encode())))
        assert "".join(record.text for record in records) == text
        assert [record.ends for record in records] == [*[False] * (len(records) - 1), True]
        assert all(len(record.text.encode()) <= 1000 for record in records)
        assert all(record.is_utf8 for record in records)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_what_unpacks_to_very_much_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(formats, "_TEXT_BYTES", 1 << 20)
    monkeypatch.setattr(formats, "_RECORD_BYTES", 1 << 20)
    start = {"a.jsonl": '{"text": "', "a.json": '[{"text": "', "a.csv": 'text\n"'}.get(name, "")
    data = start.encode() + b"all work and no play " * 2_000_000  # 42 MB
    path = put(tmp_path, name + ".gz", gzip.compress(data, 1))
    del data
    records = file_records(FileDocuments(files=str(path)))
    tracemalloc.start()
    try:
        if name == "a.txt":
            assert sum(len(record.text) for _, record in records) == 42_000_000
        else:
            with pytest.raises(CorpusError, match=r"longer than 1 MiB|larger than field limit"):
                list(records)
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


# Looking, and what a corpus is made from


def test_a_look_says_what_there_is(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path, f"{n}.jsonl.gz", gzip.compress(json.dumps({"text": f"text {n}"}).encode()))
    put(tmp_path, "empty.txt", b"")
    corpus = {"documents": [{"files": f"{tmp_path}/*", "domain": "mine"}, {"builtin": "prose"}]}
    mine, builtin = look_at(CorpusSettings.model_validate(corpus), Silent())
    assert mine.kinds == Counter({"jsonl (gzip)": 3, "text": 1})
    assert (mine.domain, mine.first) == ("mine", "text 0")
    assert mine.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (builtin.domain, builtin.kinds, builtin.first) == ("prose", {}, None)


def test_kinds_by_ending() -> None:
    assert kind_of(Path("a/b.c/x.Parquet")) == FileKind("parquet")
    assert kind_of(Path("x.v1.2.JSON.Zst")) == FileKind("json", "zstd")
    assert kind_of(Path("x"), "csv") == FileKind("csv")
    assert kind_of(Path("x.gz"), "text") == FileKind("text", "gzip")


def test_files_that_were_always_read_so_keep_their_digest(tmp_path: Path) -> None:
    """Stores made before files of other kinds could be read are taken."""

    def found(*names: str) -> str:
        files = [str(tmp_path / name) for name in names]
        return digests.digest_of_files(FileDocuments(files=files), Silent())

    names = ("a.jsonl", "b.parquet", "c.txt", "d.py")
    sums = [[name, file_digest(put(tmp_path, name, b"x" + name.encode()))] for name in names]
    assert found(*names) == digest(sums)
    for name in ("e.jsonl.gz", "f.JSONL", "g.json", "h.csv"):  # were read as plain text
        path = put(tmp_path, name, b"x")
        assert found(name) != digest([[name, file_digest(path)]])


def test_large_files_are_read_for_their_digest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_LARGE_BYTES", 10)
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**18))
    path = put(tmp_path, "a.txt", b"some bytes and more")
    entry = FileDocuments(files=str(path))
    spoken = Spoken()
    first = digests.digest_of_files(entry, spoken)
    assert spoken.bars == ["reading what files hold"]
    assert digests.digest_of_files(entry, spoken) == first
    assert len(spoken.bars) == 1
    path.write_bytes(b"same bytes and more")
    assert digests.digest_of_files(entry, spoken) != first
    assert len(spoken.bars) == 2
    kept = max((Path(os.environ["FUSELLM_CACHE"]) / "corpora").iterdir(), key=os.path.getmtime)
    kept.write_text("no digest")
    digests.digest_of_files(entry, spoken)
    assert len(spoken.bars) == 3


def test_files_that_have_just_changed_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_LARGE_BYTES", 10)
    entry = FileDocuments(files=str(put(tmp_path, "a.txt", b"some bytes and more")))
    spoken = Spoken()
    for _ in range(2):
        digests.digest_of_files(entry, spoken)
    assert len(spoken.bars) == 2


# A corpus that did not come about


def test_an_unfinished_corpus_stands_in_nobodys_way(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} {prose(n)}"}) for n in range(60)]
    put(tmp_path, "a.jsonl", "\n".join([*lines, "not JSON"]).encode())
    entry = {"files": f"{tmp_path}/a.jsonl"}
    with pytest.raises(CorpusError, match=r"a\.jsonl:61 is not JSON"):
        cut_up(tmp_path, [entry], shard_blocks=4)
    put(tmp_path, "a.jsonl", "\n".join(lines).encode())
    with pytest.raises(CorpusError, match=r"raise corpus\.held_out_share"):
        cut_up(tmp_path, [entry], held_out_share=0)
    found = cut_up(tmp_path, [entry], held_out_share=0.3, shard_blocks=100)
    assert all(found.values())
    shutil.rmtree(tmp_path / "run")
    assert cut_up(tmp_path, [entry], held_out_share=0.3, shard_blocks=100) == found


def test_a_finished_corpus_of_another_identity_stops(tmp_path: Path) -> None:
    put(tmp_path, "book.txt", BOOK.encode())
    cut_up(tmp_path, [{"files": f"{tmp_path}/book.txt"}])
    with pytest.raises(IdentityError, match=r"held_out_share was 0\.2 and is now 0\.3"):
        cut_up(tmp_path, [{"files": f"{tmp_path}/book.txt"}], held_out_share=0.3)


def test_a_bar_without_a_budget_has_no_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusellm.cli.console._PLAIN_EVERY_SECONDS", -1.0)
    with Terminal(SafeConsole()).start("cutting", 0, "bytes") as bar:
        bar.advance(27_200_000)
    shown = capsys.readouterr().out
    assert "cutting: 27.2M bytes" in shown
    assert "/0" not in shown


def test_what_was_done_before_tells_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that went on at step 45 of 119 said 2.9 steps a second, which were 0.2."""
    monkeypatch.setattr("fusellm.cli.console._PLAIN_EVERY_SECONDS", -1.0)
    monkeypatch.setattr("rich.progress.Task.elapsed", 10.0)
    with Terminal(SafeConsole()).start("training", 0, "steps") as bar:
        bar.resize(119, 45)
        bar.advance(0)
        bar.advance(2)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == "training: 45/119 steps"
    assert second == "training: 47/119 steps, 0.2 steps/s, 360 s left"


assert sys.getrecursionlimit() < 100_000  # or the deep files above are none
