"""Tokens as bytes, boundaries by a walk, blocks, and the built-in text that they are tried on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import worlds
from fusellm.errors import TokenizerError
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusellm.tokens.vocabulary import byte_alphabet, read_vocabulary
from fusellm.tokens.walk import boundaries
from fusellm.zoo import text as zoo_text
from fusellm.zoo.text import PARTS, Document, documents, drop_near_duplicates, part_of

quick = settings(max_examples=60, deadline=None, derandomize=True)
every_family = pytest.mark.parametrize("name", [*worlds.FAMILIES, *worlds.REAL])


def check_boundaries(encoder: Encoder, text: str) -> bool:
    """Hold one text's encoding against the definition of a boundary; False where refused."""
    (block,) = encoder.encode([text], [False])
    vocabulary, data = encoder.vocabulary, text.encode()
    if block.ends is None:
        return False
    ids, ends = block.ids.tolist(), block.ends.tolist()
    if vocabulary.bos_id is not None:
        assert (ids.pop(0), ends.pop(0)) == (vocabulary.bos_id, 0)
    assert len(ids) == len(ends)
    assert (ends[-1] if ends else 0) == len(data)
    start, dummies = 0, 0
    for id_, end in zip(ids, ends, strict=True):
        assert end >= start
        token = vocabulary.token_bytes[id_]
        assert token is not None
        if data[start:end] != token:
            assert vocabulary.space_mark
            assert not vocabulary.is_fallback[id_]
            assert token == b" " + data[start:end]
            dummies += 1
        start = end
    assert dummies <= 1
    return True


@every_family
@example(text="")
@example(text=" ")
@example(text="  a")
@example(text=" Hello")
@example(text="\u0958" + "a\u0301" * 3)  # NFC keeps its length and moves what is inside
@example(text="".join(worlds.SPELLED_OUT))
@given(text=worlds.texts())
@quick
def test_walk_covers_the_block_or_refuses_what_the_tokenizer_changes(name: str, text: str) -> None:
    encoder = worlds.encoder_of(name)
    assert check_boundaries(encoder, text) != worlds.changes(encoder, text)


@every_family
def test_walk_reads_characters_of_every_plane(name: str) -> None:
    """All characters below U+3000, and one in 256 above."""
    encoder = worlds.encoder_of(name)
    codes = [*range(0x3000), *range(0x3000, 0x110000, 256)]
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    text = "\n".join(c for c in characters if not worlds.changes(encoder, c))
    assert check_boundaries(encoder, text)


@pytest.mark.parametrize("name", ["sentencepiece", "byte-bpe", "byte-unigram", "llama-2", "gpt2"])
@given(text=worlds.texts())
@quick
def test_tokens_bytes_joined_are_the_text(name: str, text: str) -> None:
    """Decoding piece by piece gives the text back, but for a dummy prefix."""
    encoder = worlds.encoder_of(name)
    (block,) = encoder.encode([text], [False])
    if block.ends is None:
        return
    vocabulary = encoder.vocabulary
    pieces = [vocabulary.token_bytes[id_] for id_ in block.ids if id_ != vocabulary.bos_id]
    joined = b"".join(piece or b"" for piece in pieces)
    dummy = vocabulary.space_mark and bool(text) and not text.startswith(" ")
    assert joined == (b" " if dummy else b"") + text.encode()


@pytest.mark.parametrize("name", ["lower", "nfc"])
@example(text="\u0958" + "a\u0301" * 3)
@example(text="Straße")
@example(text="é")
@given(text=worlds.texts())
@quick
def test_walk_refuses_exactly_the_texts_that_a_normalizer_changes(name: str, text: str) -> None:
    encoder = worlds.normalizing(name)
    assert check_boundaries(encoder, text) != worlds.changes(encoder, text)


def test_a_total_that_fits_is_refused_where_the_inside_moved() -> None:
    text = "\u0958" + "a\u0301" * 3
    normalizer = worlds.normalizing("nfc").tokenizer.backend_tokenizer.normalizer
    assert len(normalizer.normalize_str(text).encode()) == len(text.encode())
    assert worlds.normalizing("nfc").encode([text], [False])[0].ends is None


def test_unknown_characters_without_byte_fallback_are_refused() -> None:
    encoder = worlds.byte_fallback_off()
    assert check_boundaries(encoder, "plain words")
    assert not check_boundaries(encoder, "plain 中 words")


def test_the_dummy_prefix_is_the_first_tokens() -> None:
    """`▁` `▁return` over " return": the text's own space is the second token's."""
    encoder = worlds.sentencepiece()
    ids = encoder.tokenizer.convert_tokens_to_ids(["▁", "▁return"])
    found = boundaries(b" return", ids, encoder.vocabulary)
    assert found is not None
    assert found.tolist() == [0, 7]


def test_a_dummy_prefix_is_read_wherever_it_stands_and_is_never_a_byte_token() -> None:
    encoder = worlds.sentencepiece()

    def walk(text: bytes, *tokens: str) -> list[int] | None:
        ids = encoder.tokenizer.convert_tokens_to_ids(list(tokens))
        found = boundaries(text, ids, encoder.vocabulary)
        return None if found is None else found.tolist()

    assert walk(b"ofreturn", "of", "▁return") == [2, 8]
    assert walk(b"ofreturn", "▁of", "▁return") == [2, 8]
    assert walk(b"of return", "▁of", "▁return") == [2, 9]
    assert walk(b" of", "<0x20>", "of") == [1, 3]
    assert walk(b"of", "<0x20>", "of") is None


def test_walk_refuses_tokens_of_another_text() -> None:
    vocabulary = worlds.byte_bpe().vocabulary
    a, space_a = vocabulary.token_bytes.index(b"a"), vocabulary.token_bytes.index(b" ")
    assert vocabulary.eos_id is not None
    assert boundaries(b"a", [a], vocabulary) is not None
    assert boundaries(b"", [], vocabulary) is not None
    for text, ids in (
        (b"b", [a]),
        (b"aa", [a]),
        (b"a", [a, a]),
        (b"a", []),
        (b"", [a]),
        (b"a", [space_a, a]),  # no dummy prefix where there are no space marks
        (b"a", [a, vocabulary.eos_id]),
        (b"a", [len(vocabulary)]),
    ):
        assert boundaries(text, ids, vocabulary) is None


@every_family
@given(text=worlds.texts(), last=st.booleans())
@quick
def test_special_tokens_are_bos_before_and_eos_after_a_documents_last_block(
    name: str, text: str, last: bool
) -> None:
    encoder = worlds.encoder_of(name)
    vocabulary = encoder.vocabulary
    (block,) = encoder.encode([text], [last])
    ids = block.ids.tolist()
    if vocabulary.bos_id is not None:
        assert ids.pop(0) == vocabulary.bos_id
    if last:
        assert ids.pop() == vocabulary.eos_id
    special = set(encoder.tokenizer.all_special_ids)
    assert not special.intersection(ids)
    if block.ends is not None:
        assert block.ids.shape == block.ends.shape
        assert block.ids.dtype == block.ends.dtype == np.int64
        if len(block.ends):
            assert block.ends[-1] == len(text.encode())


def test_many_blocks_at_once_are_encoded_as_each_alone() -> None:
    encoder = worlds.sentencepiece()
    texts, last = [worlds.sample_text(n) for n in range(3)] + [""], [False, True, False, True]
    together = encoder.encode(texts, last)
    for text, is_last, block in zip(texts, last, together, strict=True):
        (alone,) = encoder.encode([text], [is_last])
        assert np.array_equal(alone.ids, block.ids)
        assert alone.ends is not None
        assert np.array_equal(alone.ends, block.ends)
    assert encoder.encode([], []) == []


def test_byte_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for character, byte in alphabet.items():
        if byte < 0x80:
            spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))
            assert spelled[0][0] == character


@every_family
def test_special_tokens_have_no_bytes_and_every_byte_has_a_token(name: str) -> None:
    vocabulary = worlds.encoder_of(name).vocabulary
    special = worlds.encoder_of(name).tokenizer.all_special_ids
    assert all(vocabulary.token_bytes[id_] is None for id_ in special)
    alone = {token for token in vocabulary.token_bytes if token and len(token) == 1}
    assert alone >= {bytes([n]) for n in (*range(0xC0), *range(0xC2, 0xF5))}
    assert vocabulary.is_fallback.sum() == (256 if vocabulary.space_mark else 0)


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with pytest.raises(TokenizerError, match=r"neither byte-level nor SentencePiece.*BertPreTok"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


# Blocks


def slow_cut(data: bytes, most: int) -> Iterator[bytes]:
    """The rule as it is written, over every place where a cut may be."""
    while len(data) > most:
        places = [at for at in range(1, most + 1) if data[at] & 0xC0 != 0x80]
        after_line = [at for at in places if data[at - 1 : at] == b"\n"]
        after_space = [at for at in places if data[at - 1 : at] in b" \t\r\f\v\n"]
        at = (after_line or after_space or places)[-1]
        yield data[:at]
        data = data[at:]
    if data:
        yield data


@example(text="中文文字日本", block_bytes=4)
@example(text="👍👍", block_bytes=5)
@example(text="one\ntwo three", block_bytes=8)
@given(text=worlds.texts(), block_bytes=st.integers(4, 40))
@settings(quick, max_examples=300)
def test_blocks_joined_are_the_text_and_are_cut_by_the_rule(text: str, block_bytes: int) -> None:
    blocks = list(cut(text, block_bytes))
    assert "".join(blocks) == text
    assert all(0 < len(block.encode()) <= block_bytes for block in blocks)
    assert [block.encode() for block in blocks] == list(slow_cut(text.encode(), block_bytes))


def test_a_block_shorter_than_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        list(cut("a", 3))


# The built-in text


def test_parts_are_even_shares_of_a_hash() -> None:
    """10 % held out, 5 % validation, 20 % train, the zoo the rest; pinned, as runs depend on it."""
    found = [part_of(f"torch/a/file_{n}.py") for n in range(20_000)]
    for part, share in {"held_out": 0.10, "validation": 0.05, "train": 0.20, "zoo": 0.65}.items():
        assert found.count(part) / len(found) == pytest.approx(share, abs=0.01)
    pinned = ["train", "zoo", "zoo", "train", "validation", "zoo"]
    assert [part_of(f"python/{n}.py") for n in range(6)] == pinned


def numbered(first: int, last: int) -> str:
    return " ".join(f"word{n}" for n in range(first, last))


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        (numbered(0, 400), False),
        (numbered(0, 400).replace(" ", "\n\t"), False),  # white space does not count
        (numbered(0, 300) + numbered(1000, 1100), False),
        (numbered(0, 100) + " " + numbered(1000, 1300), True),
        (numbered(1000, 1400), True),
        ("", True),
    ],
)
def test_near_duplicates_are_documents_half_of_which_is_kept_apart(
    text: str, is_kept: bool
) -> None:
    apart = [Document("a", "prose", "held_out", numbered(0, 400))]
    candidate = Document("b", "prose", "train", text)
    other = Document("c", "prose", "train", numbered(5000, 5400))
    left, dropped = drop_near_duplicates(apart, [candidate, other])
    assert left == ([candidate, other] if is_kept else [other])
    assert dropped == 2 - len(left)


PADDING = "".join(f"padding_{n} = {n}\n" for n in range(20))
PROSE = " ".join(worlds.WORDS * 3)
SOURCES = {
    "module and function": f'"""{PROSE}"""\n\ndef f():\n    """Doc."""\n    return 1\n',
    "only a docstring": 'def f():\n    """Doc."""\n\nclass A:\n    """Doc.\n\n    More.\n    """\n',
    "several lines": 'class A:\n    """One.\n\n    Two.\n    """\n    x = 1\n\n'
    "    async def f(self):\n"
    '        r"""Three\n        four."""\n        return self.x\n',
    "form feeds": '\x0c\ndef f():\n    """Doc."""\n    return 1\n'
    '\x0c\nclass A:\n    """D\x0coc."""\n'
    "    x = '''a\x0cb'''\n\x0cy = 2\n",
    "line ends of Unicode": 'x = "\u2028"\ndef f():\n    """D\u2028oc\x85."""\n    return 1\n',
    "adjacent strings": "def f():\n    (\n        'one '\n        'two'\n    )\n    return 1\n",
    "nested": 'def f():\n    """One."""\n    def g():\n        """Two."""\n    return g\n',
    "a comment after it": 'def f():\n    """Doc."""  # why\n    return 1\n',
    "strings that are none": 'def f():\n    x = 1\n    """no docstring"""\n    return x\n',
    "a tab": 'class A:\n\t"""Doc."""\n\tdef f(self):\n\t\t"""Doc."""\n',
}
ONE_LINE = {
    "a class on one line": 'class Stop(Exception): """Doc."""\nx = 1\n',
    "a function on one line": 'def f(): "Doc."; return 1\nx = 1\n',
    "a statement after it": 'def f():\n    """Doc."""; x = 1\n    return x\n',
    "two statements on the module's first line": '"""Doc."""; x = 1\ny = 2\n',
}
UNDER_A_CONDITION = {
    "if": 'if x:\n    def f():\n        """Doc."""\n        return 1\n',
    "try": "try:\n    import y\nexcept ImportError:\n"
    '    class A:\n        """Doc."""\n        z = 1\n',
}


class _WithoutDocstrings(ast.NodeTransformer):
    """What is left of a tree; `...` in a docstring's place is as good as nothing there."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        owners = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, owners) and node.body:
            first = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str | type(...)):
                node.body[0:1] = [ast.Expr(ast.Constant(...))] if len(node.body) == 1 else []
        return node


def without_docstrings(source: str) -> str:
    return ast.dump(_WithoutDocstrings().visit(ast.parse(source)))


def read_back(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Document]]:
    """A file's documents by domain, as the built-in corpus reads it."""
    path = folder / "module.py"
    path.write_bytes(source.encode())
    monkeypatch.setattr(zoo_text, "_python_files", lambda: [("dist", folder, path)])
    found = list(documents(PARTS, ("prose", "python")))
    return {domain: [d for d in found if d.domain == domain] for domain in ("prose", "python")}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", [*SOURCES, *ONE_LINE, *UNDER_A_CONDITION])
def test_code_is_what_is_left_without_docstrings(
    name: str, line_end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (SOURCES | ONE_LINE | UNDER_A_CONDITION)[name] + PADDING
    source = source.replace("\n", line_end)
    (code,) = read_back(source, tmp_path, monkeypatch)["python"]
    assert code.name == "dist/module.py"
    assert without_docstrings(code.text) == without_docstrings(source)
    assert "Doc." not in code.text


def test_prose_is_the_docstrings_by_their_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        f'"""{PROSE}"""\n\nclass A:\n    """Short."""\n\n    def f(self):\n'
        f'        """Above.\n\n        {PROSE}\n          Deeper.\n        """\n'
    )
    prose = read_back(source, tmp_path, monkeypatch)["prose"]
    assert {d.name: d.text for d in prose} == {
        "dist/module.py:": PROSE + "\n",
        "dist/module.py:A.f": f"Above.\n\n{PROSE}\n  Deeper.\n",
    }
    assert all(d.part == part_of(d.name) for d in prose)


def test_installed_code_without_docstrings_is_the_same_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(ast.__file__).parent
    paths = sorted(folder.glob("[a-d]*.py"))
    monkeypatch.setattr(zoo_text, "_python_files", lambda: [("python", folder, p) for p in paths])
    left = {document.name: document.text for document in documents(PARTS, ("python",))}
    assert len(left) > 20
    for name, text in left.items():
        source = (folder / name.removeprefix("python/")).read_text("utf-8")
        assert without_docstrings(text) == without_docstrings(source), name
