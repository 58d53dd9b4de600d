"""Tokens as bytes, boundaries by a walk, blocks, and the built-in text that they are tried on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import worlds
from fusellm.errors import TokenizerError
from fusellm.store.identity import digest, tokenizer_fingerprint
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusellm.tokens.spelling import Spelling
from fusellm.tokens.text_ids import rules_of
from fusellm.tokens.vocabulary import TokenKind, byte_alphabet, read_vocabulary
from fusellm.tokens.walk import boundaries
from fusellm.zoo import text as zoo_text
from fusellm.zoo.text import PARTS, Document, documents, drop_near_duplicates, part_of

quick = settings(max_examples=60, deadline=None, derandomize=True)
every_family = pytest.mark.parametrize("name", [*worlds.FAMILIES, *worlds.REAL])


def check_boundaries(encoder: Encoder, text: str, dummies_allowed: int = 1) -> bool:
    """Hold one text's encoding against the definition of a boundary; False where refused."""
    (block,) = encoder.encode([text], [False])
    vocabulary, data = encoder.vocabulary, text.encode()
    if block.ends is None:
        return False
    ids, ends = block.ids.tolist(), block.ends.tolist()
    for prefix_id in vocabulary.prefix_ids:
        assert (ids.pop(0), ends.pop(0)) == (prefix_id, 0)
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
    assert dummies <= dummies_allowed
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
    pieces = [vocabulary.token_bytes[id_] for id_ in block.ids[block.prefix_tokens :]]
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


def test_where_the_dummy_prefix_is_always_put_it_is_the_first_mark() -> None:
    """`▁` `▁return` over " return": the text's own space is the second token's."""
    for name, expected in (("always-prefixed", [0, 7]), ("sentencepiece", [1, 7])):
        encoder = worlds.encoder_of(name)
        ids = encoder.tokenizer.convert_tokens_to_ids(["▁", "▁return"])
        found = boundaries(b" return", ids, encoder.vocabulary)
        assert found is not None
        assert found.tolist() == expected


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
    for prefix_id in vocabulary.prefix_ids:
        assert ids.pop(0) == prefix_id
    if last:
        assert ids.pop() == vocabulary.eos_id
    special = set(encoder.tokenizer.all_special_ids)
    assert not special.intersection(ids)
    if block.ends is not None:
        assert block.ids.shape == block.ends.shape
        assert block.ids.dtype == block.ends.dtype == np.int64
        if len(block.ends):
            assert block.ends[-1] == len(text.encode())


def test_what_a_tokenizer_puts_before_a_text_is_put_and_what_it_puts_after_it_is_not() -> None:
    plain, glm = worlds.byte_bpe(), worlds.glm_like()
    assert glm.tokenizer.convert_ids_to_tokens(list(glm.vocabulary.prefix_ids)) == [*worlds.PREFIX]
    assert plain.vocabulary.prefix_ids == ()
    text = "the model reads"
    (own,), (block, last) = plain.encode([text], [False]), glm.encode([text] * 2, [False, True])
    assert own.ends is not None
    assert block.ends is not None
    assert block.prefix_tokens == 2
    assert block.ids.tolist() == [*glm.vocabulary.prefix_ids, *own.ids]
    assert block.ends.tolist() == [0, 0, *own.ends]
    assert last.ids.tolist() == glm.tokenizer(text)["input_ids"]


def test_a_prefix_is_told_whatever_it_is_made_of() -> None:
    """A token of text, BOS among others, one token twice."""
    base = worlds.sentencepiece().tokenizer
    for before in (["\n"], ["<s>", "<a>"], ["<a>", "<a>", "</s>"], []):
        encoder = Encoder(worlds.putting(base, before, ["</s>"]))
        assert encoder.tokenizer.convert_ids_to_tokens([*encoder.vocabulary.prefix_ids]) == before


def test_a_tokenizer_of_one_token_or_none_before_a_text_has_the_fingerprint_it_had() -> None:
    """Stores that were made before longer prefixes were known are taken."""
    for name, bos in (("sentencepiece", 1), ("byte-bpe", None)):
        encoder = worlds.encoder_of(name)
        before = [encoder.rules, [bos, encoder.vocabulary.eos_id]]
        assert tokenizer_fingerprint(encoder) == digest(before)
    glm, other = worlds.glm_like(), worlds.putting(worlds.byte_bpe().tokenizer, worlds.PREFIX[::-1])
    assert tokenizer_fingerprint(glm) != tokenizer_fingerprint(Encoder(other))


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


# Every family against an oracle that knows no bytes of tokens


Ends = list[int | None]


def ends_by_decoding(encoder: Encoder, text: str, ids: list[int]) -> Ends | None:
    """Boundaries told by decoding every prefix of the ids, None within a character.

    None altogether where the tokens do not decode to the text: the tokenizer changes it. The
    library's decoders may drop the first space, or keep a dummy one.
    """
    begun = [ids[:n] for n in range(len(ids) + 1)]
    if hasattr(encoder.tokenizer, "sp_model"):
        *prefixes, whole = [encoder.tokenizer.sp_model.decode(some) for some in begun]
    else:
        decode = encoder.tokenizer.backend_tokenizer.decode_batch
        *prefixes, whole = decode(begun, skip_special_tokens=False)
    if set(ids) & set(encoder.tokenizer.all_special_ids):
        return None  # unknown characters; and Unigram finds `</s>` in a text as it finds any token
    if whole == text:
        front, dropped = "", 0
    elif " " + whole == text:
        front, dropped = " ", 0
    elif whole == " " + text:
        front, dropped = "", 1
    else:
        return None
    ends: Ends = []
    for piece in [*prefixes[1:], *([whole] if ids else [])]:
        read = (front + piece)[dropped:]
        within = piece.endswith("\ufffd") or not text.startswith(read)
        ends.append(None if within else len(read.encode()))
    if ids:
        ends[-1] = len(text.encode())
    return ends


def agree(found: list[int], expected: Ends) -> None:
    """Boundaries are those expected; within characters they stay within, and never go back."""
    assert len(found) == len(expected)
    assert found == sorted(found)
    for end, meant in zip(found, expected, strict=True):
        assert meant is None or end == meant


def read(encoder: Encoder, text: str) -> tuple[list[int], list[int] | None]:
    """(ids, boundaries) of one text, without prefix."""
    (block,) = encoder.encode([text], [False])
    before = block.prefix_tokens
    ends = None if block.ends is None else block.ends.tolist()[before:]
    return block.ids.tolist()[before:], ends


@pytest.mark.parametrize("name", [*worlds.FAMILIES, *worlds.MORE_FAMILIES, *worlds.REAL])
@example(text=" a")
@example(text="  ")
@example(text="▁▁a")
@example(text="<unk>")
@given(text=worlds.any_text())
@quick
def test_boundaries_are_where_decoding_puts_them_or_the_block_is_refused(
    name: str, text: str
) -> None:
    encoder = worlds.encoder_of(name)
    ids, found = read(encoder, text)
    expected = ends_by_decoding(encoder, text, ids)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        agree(found, expected)


@pytest.mark.parametrize("name", worlds.SLOW_FAMILIES)
@given(text=worlds.any_text())
@quick
def test_tokenizers_in_python_are_walked_as_their_fast_twins(name: str, text: str) -> None:
    encoder = worlds.encoder_of(name)
    ids, found = read(encoder, text)
    data = text.encode()
    if name == "raw-bytes":
        assert [id_ - 3 for id_ in ids] == list(data)
        assert found == list(range(1, len(data) + 1))
    elif name == "slow-byte-level":
        assert (ids, found) == read(worlds.byte_bpe(), text)
    else:
        expected = ends_by_decoding(encoder, text, ids)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            agree(found, expected)


@pytest.mark.parametrize("name", worlds.NORMALIZERS)
@example(text=" a  b ")
@example(text="ﬁ é É e\u0301")
@given(text=worlds.any_text())
@quick
def test_a_normalizing_tokenizer_is_refused_whenever_it_changes_the_text(
    name: str, text: str
) -> None:
    encoder = worlds.normalizing(name)
    normalizer = encoder.tokenizer.backend_tokenizer.normalizer
    assert (read(encoder, text)[1] is None) == (normalizer.normalize_str(text) != text)


@pytest.mark.parametrize(
    "settings_",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "model_type": "bpe"},
        {"model_type": "bpe", "user_defined_symbols": ["<add>", "  "]},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_models_of_the_sentencepiece_library(settings_: dict[str, object]) -> None:
    encoder = Encoder(worlds.slow_sentencepiece_tokenizer(**settings_))
    assert encoder.vocabulary.kind is TokenKind.SPACE_MARKS
    is_prefixed = settings_.get("add_dummy_prefix", True)
    assert encoder.vocabulary.space_mark == is_prefixed
    strips = "remove_extra_whitespaces" in settings_ or "normalization_rule_name" in settings_
    assert encoder.vocabulary.doubles == (
        is_prefixed and not settings_.get("remove_extra_whitespaces", False)
    )
    for text in ("the value", " the value", "the  value", "the value ", "ﬁ", "\u3000the", "ψ"):
        ids, found = read(encoder, text)
        pieces = [encoder.tokenizer.sp_model.IdToPiece(id_) for id_ in ids]
        assert found is None or found[-1] == len(text.encode())
        if not strips and text.isascii():
            assert found is not None
        if "ψ" in text and "byte_fallback" in settings_:
            assert "<unk>" in pieces
            assert found is None
        if "ﬁ" in text and "normalization_rule_name" in settings_:
            assert found is None
        if settings_.get("remove_extra_whitespaces") and text in ("the  value", "the value "):
            assert found is None


# Added and special tokens, ids without a token


def by_sections(encoder: Encoder, base: Encoder, text: str) -> tuple[list[int], Ends | None]:
    """Ids and boundaries told by reading each piece between added tokens as a text of its own."""
    ids: list[int] = []
    ends: Ends | None = []
    start = 0
    for piece in re.split(f"({'|'.join(map(re.escape, worlds.ADDED))})", text):
        if piece in worlds.ADDED:
            ids.append(encoder.tokenizer.convert_tokens_to_ids(piece))
            own: Ends | None = [len(piece.encode())]
        else:
            own_ids, _ = read(base, piece)
            own = ends_by_decoding(base, piece, own_ids)
            ids += own_ids
        if ends is not None:
            ends = None if own is None else [*ends, *((e and start + e) or e for e in own)]
        start += len(piece.encode())
    return ids, ends


@st.composite
def texts_with_added(draw: st.DrawFn) -> str:
    """Texts with added tokens in them, spaces and marks beside these."""
    pieces = st.one_of(
        st.sampled_from(worlds.ADDED), worlds.any_text(), st.sampled_from([" ", "  ", "a", " a"])
    )
    return "".join(draw(st.lists(pieces, max_size=8)))


# "sentencepiece" puts its dummy prefix before the first section only.
SECTIONED = (
    "always-prefixed",
    "prefixed-unless-space",
    "never-prefixed",
    "byte-bpe",
    "byte-prefixed",
)


@pytest.mark.parametrize("name", SECTIONED)
@example(text="a<add> b<add>  <add>c 中文<")
@given(text=texts_with_added())
@quick
def test_added_tokens_stand_for_their_content_and_begin_the_text_anew(name: str, text: str) -> None:
    base = worlds.encoder_of(name)
    encoder = worlds.added_to(name)
    ids, found = read(encoder, text)
    expected_ids, expected = by_sections(encoder, base, text)
    assert ids == expected_ids
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert len(found) == len(expected)
        start = 0
        for end, meant in zip(found, expected, strict=True):
            # Within a section's first character an empty mark is told from nothing by no decoding.
            assert meant is None or meant == 0 or end == meant
            assert end >= start
            start = end


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized"])
@pytest.mark.parametrize("name", ["always-prefixed", "sentencepiece", "byte-bpe"])
@example(text="<add>")
@example(text=" <add>  <add> a")
@given(text=texts_with_added())
@quick
def test_flags_of_added_tokens_never_make_a_wrong_boundary(name: str, flag: str, text: str) -> None:
    encoder = worlds.added_to(name, **{flag: True})
    if not check_boundaries(encoder, text, dummies_allowed=99):
        is_strip = flag in ("lstrip", "rstrip") and re.search(r"\s", text)
        assert is_strip or "\u2581" in text


def test_an_added_token_that_takes_the_space_before_it_is_told_with_it() -> None:
    encoder = worlds.added_to("always-prefixed", normalized=True)
    for text, expected in (("<add>a", [5, 6]), (" <add>a", [0, 6, 7]), ("a <add>a", [1, 7, 8])):
        assert read(encoder, text)[1] == expected


def test_a_token_listed_as_added_that_the_model_emits_too_is_the_models() -> None:
    """Gemma's "▁▁"."""
    encoder = worlds.gemma_like()
    vocabulary, tokenizer = encoder.vocabulary, encoder.tokenizer
    two, line, bold = tokenizer.convert_tokens_to_ids(["▁▁", "\n\n", "<b>"])
    assert [vocabulary.token_bytes[n] for n in (two, line, bold)] == [b"  ", b"\n\n", b"<b>"]
    ids, found = read(encoder, "a  <b>\n\n b")
    assert two in ids
    assert found is not None
    assert read(encoder, "a▁▁b")[1] is None


def test_special_tokens_in_a_text_are_text_for_tokenizers_in_python_too() -> None:
    tokenizer = worlds.SlowByteLevel()
    plain = {"normalized": False, "special": False}
    tokenizer.add_tokens([AddedToken("<add>", rstrip=True, **plain), AddedToken("<b>", **plain)])
    encoder = Encoder(tokenizer)
    ids, found = read(encoder, "a<b> <|endoftext|>")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["a", "<b>", "Ġ<"]
    assert found is not None
    assert found[:3] == [1, 4, 6]
    assert read(encoder, "a<add> b")[1] is None  # the space is gone
    assert read(encoder, "a<add>b")[1] == [1, 6, 7]
    assert read(encoder, "<|endoftext|>")[1] is not None


def test_tokenizers_in_python_that_lose_spaces_are_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match=r"neither byte-level nor SentencePiece.*it spells"):
        read_vocabulary(worlds.SlowWords())


def test_a_token_that_looks_like_a_byte_is_text() -> None:
    layout = worlds.layout_of("sentencepiece")
    vocabulary = layout["model"]["vocab"]
    for spelling in ("<0xGG>", "<0x0a>", "<0x+1>"):
        vocabulary[spelling] = len(vocabulary)
    read_back = worlds.fast_of(layout).vocabulary
    for spelling in ("<0xGG>", "<0x0a>", "<0x+1>"):
        assert read_back.token_bytes[vocabulary[spelling]] == spelling.encode()
    assert read_back.token_bytes[vocabulary["<0x0A>"]] == b"\n"
    layout["model"]["byte_fallback"] = False
    assert worlds.fast_of(layout).vocabulary.token_bytes[vocabulary["<0x0A>"]] == b"<0x0A>"


def test_bytes_that_are_flagged_special_are_bytes() -> None:
    """The model cuts text into them; one that has a role as well stands for that."""
    layout = worlds.layout_of("sentencepiece")
    vocabulary = layout["model"]["vocab"]
    plain = worlds.fast_of(layout)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = {token["content"] for token in layout["added_tokens"]}
    layout["added_tokens"] += [
        {"id": vocabulary[name], "content": name, "special": True} | flags
        for name in (f"<0x{byte:02X}>" for byte in range(256))
        if name not in listed
    ]
    flagged = worlds.fast_of(layout)
    assert flagged.vocabulary.token_bytes == plain.vocabulary.token_bytes
    assert np.array_equal(flagged.vocabulary.is_fallback, plain.vocabulary.is_fallback)
    for text in ("a \u4e2d\u6587 b", "ψ", "spelled <0x41> out", "\x00\x7f"):
        assert read(flagged, text) == read(plain, text)
        assert read(flagged, text)[1] is not None
    flagged.tokenizer.eos_token = "<0x0A>"
    assert read_vocabulary(flagged.tokenizer).token_bytes[vocabulary["<0x0A>"]] is None


def test_halves_of_a_surrogate_pair_have_no_bytes() -> None:
    assert Spelling(TokenKind.SPACE_MARKS).bytes_of("\ud800") is None
    assert Spelling(TokenKind.RAW).bytes_of("\ud800") is None
    assert Spelling(TokenKind.BYTE_LEVEL).bytes_of("\ud800") is None


def test_ids_between_tokens_and_rows_of_a_padded_head_have_no_bytes() -> None:
    layout = worlds.layout_of("byte-bpe")
    highest = max(layout["model"]["vocab"].values())
    layout["added_tokens"].append(
        layout["added_tokens"][0] | {"id": highest + 9, "content": "<far>", "special": False}
    )
    layout["model"]["vocab"]["<far>"] = highest + 9
    encoder = worlds.fast_of(layout)
    assert len(encoder.tokenizer) == highest + 2
    assert len(encoder.vocabulary) == highest + 10
    assert encoder.vocabulary.token_bytes[highest + 1 :] == (*[None] * 8, b"<far>")
    assert read(encoder, "a<far>")[1] == [1, 6]


def test_another_space_mark() -> None:
    layout = worlds.layout_of("unigram")
    for piece in layout["model"]["vocab"]:
        piece[0] = piece[0].replace("▁", "_")
    layout["pre_tokenizer"]["replacement"] = "_"
    encoder = worlds.fast_of(layout)
    assert read(encoder, "the value")[1] is not None
    assert read(encoder, "the_value")[1] is None


def test_the_unknown_token_has_no_bytes_where_nobody_says_that_it_is_special() -> None:
    for name in ("unigram-unknown", "sentencepiece"):
        layout = worlds.layout_of(name)
        layout["added_tokens"], layout["post_processor"] = [], None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=worlds.tokenizer_of(layout))
        vocabulary = read_vocabulary(tokenizer)
        assert tokenizer.all_special_ids == []
        assert vocabulary.token_bytes[tokenizer.convert_tokens_to_ids("<unk>")] is None


def test_the_byte_alphabet_may_be_the_normalizers() -> None:
    layout = worlds.layout_of("byte-bpe")
    layout |= {"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": None}
    encoder = worlds.fast_of(layout)
    assert encoder.vocabulary.kind is TokenKind.BYTE_LEVEL
    assert check_boundaries(encoder, "the  naïve\n 日本語")


def test_a_dummy_prefix_before_every_word_and_white_space_lost() -> None:
    """T5's: only words with one space between them are covered."""
    layout = worlds.layout_of("unigram")
    words = {"type": "WhitespaceSplit"}
    layout["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [words, layout["pre_tokenizer"]],
    }
    encoder = worlds.fast_of(layout)
    for text, is_read in (("the value of", True), (" the", True), ("the\nvalue", False)):
        assert check_boundaries(encoder, text) == is_read
    for text in ("the  value", "the value ", "the\tvalue", " "):
        assert not check_boundaries(encoder, text)


def test_a_dummy_prefix_before_every_piece_is_told_from_the_texts_spaces() -> None:
    """White space cut off first, then a mark before each piece that begins with none."""
    layout = worlds.layout_of("unigram")
    white = {"type": "Split", "pattern": {"Regex": " +"}, "behavior": "Isolated", "invert": False}
    layout["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [white, layout["pre_tokenizer"]],
    }
    layout["model"]["vocab"] += [["▁b", -1.0]]
    encoder = worlds.fast_of(layout)
    ids, found = read(encoder, "  b")
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["▁", "▁", "▁b"]
    assert found == [1, 2, 3]


class SlowTiktoken(worlds.SlowByteLevel):
    """Tokens are bytes, as in some models' own code."""

    def _convert_id_to_token(self, index: int) -> bytes:
        return bytes(byte_alphabet()[c] for c in super()._convert_id_to_token(index))


def test_tokenizers_in_python_may_spell_tokens_as_bytes() -> None:
    encoder = Encoder(SlowTiktoken())
    text = "the  naïve\n 日本語"
    assert read(encoder, text) == read(worlds.byte_bpe(), text)
    assert encoder.rules


def test_rules_are_equal_for_tokenizers_that_cut_alike() -> None:
    fast = [worlds.byte_bpe(), Encoder(worlds.byte_bpe().tokenizer), worlds.sentencepiece()]
    slow = [Encoder(worlds.SlowByteLevel()), Encoder(worlds.SlowByteLevel()), worlds.raw_bytes()]
    for same, twin, other in (fast, slow):
        assert same.rules == twin.rules != other.rules
    more = worlds.SlowByteLevel()
    more.add_tokens(["<add>"])
    assert rules_of(more) != slow[0].rules


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


@pytest.mark.parametrize("start", range(0, 20_000, 1000))
def test_half_of_a_document_is_half_of_all_its_word_8_grams(start: int) -> None:
    apart = [Document("a", "prose", "held_out", numbered(start, start + 400))]
    # Of 200 8-grams 102 and 98 stand in the document kept apart.
    texts = [
        f"{numbered(start, start + count)} {numbered(50_000, 50_207 - count)}"
        for count in (109, 105)
    ]
    training = [Document(text[:9], "prose", "train", text) for text in texts]
    left, _ = drop_near_duplicates(apart, training)
    assert left == training[1:]


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
