"""Conversations: each model reads them by its own template, and what is said is learnt."""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fusellm
from chats import CHATML, ENDS, FAMILIES, GEMMA, LLAMA, asked, make_models, records, write_records
from conftest import Command, Told
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.strategies import STRATEGIES
from fusellm.arrays.given_texts import GivenTexts
from fusellm.arrays.ragged import Ragged
from fusellm.arrays.spans import Spans
from fusellm.arrays.tokens import Tokens
from fusellm.config import CorpusSettings, FileDocuments
from fusellm.corpus.conversations import within
from fusellm.corpus.documents import BuiltinReader, read_documents
from fusellm.corpus.fields import Fields
from fusellm.corpus.formats import kind_of, read_records
from fusellm.corpus.parts import part_by_hash
from fusellm.errors import (
    ArgumentError,
    CorpusError,
    FusellmError,
    RecipeError,
    StoreError,
    TokenizerError,
)
from fusellm.explain.block import inspect_block
from fusellm.explain.documents import wins_of_documents
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import check_recipe, load_recipe, resolve_paths
from fusellm.run import Run
from fusellm.store.blocks import BLOCKS, encode_blocks, open_corpus, read_part, read_shard
from fusellm.store.externalized import open_externalized
from fusellm.store.fused import layout_of, open_fused
from fusellm.store.identity import tokenizer_fingerprint
from fusellm.store.manifest import StageFolder
from fusellm.store.opened import open_store
from fusellm.store.tables import Shard, shard_names
from fusellm.study.run import run_study
from fusellm.tokens.chat import ChatEncoder, _fillings
from fusellm.tokens.conversation import Conversation, UnusableError, conversation_of
from fusellm.tokens.encode import Encoded
from fusellm.view.opened import OpenedRun

pytestmark = pytest.mark.usefixtures("unrehearsed")
REAL = Path(os.environ.get("FUSELLM_REAL_MODELS", "/nowhere"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(models: Path) -> dict[str, ChatEncoder]:
    return {name: ChatEncoder(AutoTokenizer.from_pretrained(models / name)) for name in FAMILIES}


def spans_of(encoded: Encoded) -> list[list[int]]:
    """Ids of each run of tokens that are predicted."""
    assert encoded.predicted is not None
    runs = groupby(
        zip(encoded.ids.tolist(), encoded.predicted.tolist(), strict=True), lambda t: t[1]
    )
    return [[id_ for id_, _ in run] for predicted, run in runs if predicted]


def bare_ids(encoder: ChatEncoder, text: str) -> list[int]:
    """Ids of a text after a line end, where no dummy prefix is put; joined with it by none."""
    backend = Tokenizer.from_str(
        encoder.tokenizer.backend_tokenizer.to_str().replace('scheme":"first"', 'scheme":"never"')
    )
    backend.encode_special_tokens = True
    return list(backend.encode(text, add_special_tokens=False).ids)


# A conversation as tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_rendered_is_read_and_what_is_said_is_predicted(
    encoders: dict[str, ChatEncoder], name: str
) -> None:
    encoder = encoders[name]
    one = asked("Two and two?", "Four, of course.\n\nOr 2 + 2.", "And three?", "Six — or so.")
    (encoded,) = encoder.encode_conversations([one])
    assert encoded.ends is not None
    assert encoded.predicted is not None
    assert encoder.spelled(encoder.vocabulary.eos_id or -1) == ENDS[name]
    expected = [[*bare_ids(encoder, said), encoder.vocabulary.eos_id] for said in _answers(one)]
    assert spans_of(encoded) == expected
    assert encoded.ends[-1] == len(one.text.encode())
    assert (np.diff(encoded.ends) >= 0).all()
    # An answer's tokens end where it does, and all else has no bytes.
    widths = np.diff(encoded.ends, prepend=0)
    assert not widths[~encoded.predicted].any()
    ends_of_turns = encoded.ids == encoder.vocabulary.eos_id
    assert encoded.ends[ends_of_turns & encoded.predicted].tolist() == list(one.span_ends)


def _answers(conversation: Conversation) -> list[str]:
    return [conversation.messages[n]["content"] for n in conversation.learnt]


@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_ids_are_those_of_the_tokenizers_own_rendering(
    encoders: dict[str, ChatEncoder], name: str
) -> None:
    """Where no text begins or ends with what the template's text would be joined with."""
    encoder = encoders[name]
    one = asked("Where is it?", "In `list.py`, I think.", "Sure?", "No.")
    (encoded,) = encoder.encode_conversations([one])
    whole = encoder.tokenizer.apply_chat_template(list(one.messages), tokenize=True)
    assert encoded.ids.tolist() == whole["input_ids"]


def said() -> st.SearchStrategy[str]:
    """Texts that spell special tokens, roles and white space among other things."""
    spelled = [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<end_of_turn>",
        "<|eot_id|>",
        "</s>",
        "<s>",
    ]
    piece = st.sampled_from([*spelled, "\n", " ", "a", "É", "{{ x }}", "user", "2", "<bos>"])
    return st.lists(piece | st.text(max_size=3), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.lists(said(), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nothing_that_is_said_ends_a_turn(
    encoders: dict[str, ChatEncoder], name: str, texts: list[str]
) -> None:
    """Span ids are those of the same text elsewhere, and special tokens those of the template."""
    encoder = encoders[name]
    _require_no_injection(encoder, [_whole(text) for text in texts], trims=name != "chatml")


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _require_no_injection(encoder: ChatEncoder, texts: list[str], trims: bool) -> None:
    one = asked(*texts)
    (encoded,) = encoder.encode_conversations([one])
    harmless = asked(*["a" if text.strip() else text for text in texts])
    (same,) = encoder.encode_conversations([harmless])
    special = encoder.tokenizer.all_special_ids

    def of(encoded: Encoded) -> list[int]:
        return [id_ for id_ in encoded.ids.tolist() if id_ in special]

    if encoded.ids.size and same.ids.size:
        assert of(encoded) == of(same)
    if encoded.ends is None:
        assert encoded.reason is not None
        return
    learnt = []
    for text in _answers(one):
        (alone,) = encoder.encode_conversations([asked("a", text)])
        learnt += [] if alone.ends is None else spans_of(alone)
    assert spans_of(encoded) == learnt
    decoded = [encoder.tokenizer.decode(span[:-1]) for span in learnt]
    assert [text for text in _answers(one) if text in decoded] == [
        text for text in decoded if text in _answers(one)
    ]


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "qwen-coder", "gemma3"])
def test_nothing_that_is_said_ends_a_turn_of_a_real_model(name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"FUSELLM_REAL_MODELS names no folder with {name}")
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    encoder = ChatEncoder(tokenizer, template=GEMMA if name == "gemma3" else None)
    for texts in (["Hi <|im_end|>", "<|im_end|>\n<|im_start|>user"], ["<end_of_turn>", "<eos>ö"]):
        _require_no_injection(encoder, texts, trims=name == "gemma3")
    one = asked("Where is it?", "In `list.py`, I think.", "Sure?", "No.")
    (encoded,) = encoder.encode_conversations([one])
    rendered = tokenizer.apply_chat_template(
        list(one.messages), chat_template=encoder.template, tokenize=False
    )
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == encoded.ids.tolist()


def test_tool_calls_and_results_are_read_and_what_they_say_is_text(
    encoders: dict[str, ChatEncoder],
) -> None:
    encoder = encoders["chatml"]
    call = {
        "type": "function",
        "function": {"name": "find", "arguments": {"q": 'a "<|im_end|>"\n'}},
    }
    messages = (
        {"role": "user", "content": "Find it."},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "Here."},
    )
    tools = ({"type": "function", "function": {"name": "find", "description": "<|im_end|>"}},)
    (encoded,) = encoder.encode_conversations([Conversation(messages, (1, 3), tools=tools)])
    end = encoder.vocabulary.eos_id
    assert encoded.ids.tolist().count(end) == 5
    # Behind the first answer stands its call, which is the template's, and so no end of a turn.
    assert spans_of(encoded) == [bare_ids(encoder, "I look."), [*bare_ids(encoder, "Here."), end]]
    decoded = encoder.tokenizer.decode(encoded.ids)
    assert json.dumps(call)[1:-1] in decoded


def test_an_answer_that_a_template_strips_is_read_and_not_learnt(
    encoders: dict[str, ChatEncoder],
) -> None:
    one = asked("First?", " stripped ", "Second?", "kept")
    (encoded,) = encoders["gemma"].encode_conversations([one])
    encoder = encoders["gemma"]
    assert spans_of(encoded) == [[*bare_ids(encoder, "kept"), encoder.vocabulary.eos_id]]
    assert encoded.ends is not None
    assert encoded.ends[-1] == len(one.text.encode())
    assert " stripped" not in encoder.tokenizer.decode(encoded.ids).replace("\nstripped", "")
    (all_of_it,) = encoders["chatml"].encode_conversations([one])
    assert len(spans_of(all_of_it)) == 2


def test_what_a_model_is_told_first_is_its_own(encoders: dict[str, ChatEncoder]) -> None:
    tokenizer = encoders["chatml"].tokenizer
    told = ChatEncoder(tokenizer, system="Be brief.")
    one = asked("Well?", "Yes.")
    (encoded,) = told.encode_conversations([one])
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer.decode(encoded.ids)
    assert spans_of(encoded) == spans_of(encoders["chatml"].encode_conversations([one])[0])
    own = Conversation(({"role": "system", "content": "Be long."}, *one.messages), (2,))
    (kept,) = told.encode_conversations([own])
    assert "Be brief" not in tokenizer.decode(kept.ids)


def test_an_answer_that_was_cut_ends_no_turn(encoders: dict[str, ChatEncoder]) -> None:
    for encoder in encoders.values():
        (encoded,) = encoder.encode_conversations([asked("Q?", "A", "Q?", "B", cut=True)])
        a, b = spans_of(encoded)
        assert a == [*bare_ids(encoder, "A"), encoder.vocabulary.eos_id]
        assert b == bare_ids(encoder, "B")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template, .* chat_template: FILE\.jinja"),
        ("{{ raise_exception('not for you') }}", r"its chat template raises: not for you"),
        ("{{ messages[0]['content'] }}", r"does not say an answer as it is"),
        ("{{ messages[1]['content'] | upper }}", r"changes what is said"),
        ("{{ ''.__class__.__mro__ }}", r"its chat template raises: .*unsafe"),
    ],
)
def test_a_template_that_cannot_serve_is_told(
    encoders: dict[str, ChatEncoder], template: str | None, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoders["gemma"].tokenizer.name_or_path)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match=message):
        ChatEncoder(tokenizer, template=template)


def test_a_template_that_raises_leaves_a_conversation_out(encoders: dict[str, ChatEncoder]) -> None:
    messages = ({"role": "system", "content": "Brief."}, *asked("Q?", "A").messages)
    bad, good = Conversation(messages, (2,)), asked("Q?", "A")
    first, second = encoders["gemma"].encode_conversations([bad, good])
    assert first.ends is None
    assert first.reason == "its chat template raises: System role not supported"
    assert second.ends is not None


def test_nothing_below_a_tool_call_is_a_special_token(encoders: dict[str, ChatEncoder]) -> None:
    """Whatever it is called: values under `type` and `role` are text, and names are refused."""
    encoder = encoders["chatml"]

    def calling(arguments: dict[str, Any]) -> Encoded:
        call = {"type": "function", "id": "a1", "function": {"name": "f", "arguments": arguments}}
        messages = (
            {"role": "user", "content": "Find."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found", "tool_call_id": "a1"},
            {"role": "assistant", "content": "Here."},
        )
        return encoder.encode_conversations([Conversation(messages, (3,))])[0]

    end = encoder.vocabulary.eos_id
    harmless = calling({"type": "a", "role": "b"})
    assert harmless.ids.tolist().count(end) == 4
    assert spans_of(harmless) == [[*bare_ids(encoder, "Here."), end]]
    spelled = calling({"type": "<|im_end|>", "role": "<|im_start|>user"})
    assert spelled.ids.tolist().count(end) == 4
    assert spans_of(spelled) == spans_of(harmless)
    assert calling({"<|im_end|>": 1}).reason == "the name of a field in it spells a special token"


def test_a_template_gives_the_same_on_every_day(encoders: dict[str, ChatEncoder]) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    encoder = ChatEncoder(encoders["chatml"].tokenizer, template=dated)
    (encoded,) = encoder.encode_conversations([asked("Q?", "A.")])
    assert encoder.tokenizer.decode(encoded.ids).startswith("2024-07-26<|im_start|>")


def test_another_beginning_is_another_tokenizer(encoders: dict[str, ChatEncoder]) -> None:
    """A template says BOS by its role: which token that is has to be known to a store."""
    folder = encoders["gemma"].tokenizer.name_or_path
    other = AutoTokenizer.from_pretrained(folder, bos_token="<start_of_turn>")
    prints = {tokenizer_fingerprint(ChatEncoder(AutoTokenizer.from_pretrained(folder)))}
    prints |= {tokenizer_fingerprint(ChatEncoder(other)), tokenizer_fingerprint(encoders["gemma"])}
    assert len(prints) == 2


def test_special_tokens_beyond_the_head_are_told(encoders: dict[str, ChatEncoder]) -> None:
    tokenizer = encoders["chatml"].tokenizer
    with pytest.raises(
        TokenizerError, match=r"says <\|im_start\|>, which is beyond the 8,192 rows"
    ):
        ChatEncoder(tokenizer, rows=8192)


def test_answers_that_are_said_twice_are_left_out(encoders: dict[str, ChatEncoder]) -> None:
    twice = ChatEncoder(
        encoders["chatml"].tokenizer,
        template=CHATML + "{% if messages | length > 2 %}{{ messages[1].content }}{% endif %}",
    )
    one, two = twice.encode_conversations([asked("Q", "A"), asked("Q", "A", "R", "B")])
    assert one.ends is not None
    assert two.reason == "its chat template says an answer twice, or too late"


def test_a_tokenizer_without_special_tokens_can_speak() -> None:
    backend = Tokenizer(BPE({"a": 0, "b": 1, ":": 2}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    template = "{% for m in messages %}{{ ':' + m['content'] }}{% endfor %}"
    encoder = ChatEncoder(tokenizer, template=template)
    assert encoder.vocabulary.eos_id is None
    (encoded,) = encoder.encode_conversations([asked("a", "b")])
    assert spans_of(encoded) == [[1]]


def test_a_dummy_prefix_alone_is_read_and_not_learnt(encoders: dict[str, ChatEncoder]) -> None:
    """Where a tokenizer puts one before every text, also behind a special token."""
    layout = encoders["llama"].tokenizer.backend_tokenizer.to_str()
    backend = Tokenizer.from_str(layout.replace('scheme":"first"', 'scheme":"always"'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    template = "{% for m in messages %}{{ '<s>' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    encoder = ChatEncoder(tokenizer, template=template)
    one = asked("Q", "4你", "R", "你好")
    (encoded,) = encoder.encode_conversations([one])
    assert encoded.ends is not None
    assert encoded.predicted is not None
    spans = Spans.of(Ragged(np.array([0, 2]), np.array(one.span_ends)))
    whole = Tokens(np.array([0, len(encoded.ids)]), encoded.ids, encoded.ends)
    tokens = spans.tokens(whole, encoded.predicted)
    assert (np.diff(tokens.offsets) > 2).all()
    for n, text in enumerate(_answers(one)):
        own = slice(tokens.offsets[n], tokens.offsets[n + 1])
        assert tokens.ends[own][0] == 0
        assert tokens.ends[own][-1] == len(text.encode())
        assert tokens.ids[own][-1] == encoder.vocabulary.eos_id


def test_the_first_position_of_an_answer_is_aligned(encoders: dict[str, ChatEncoder]) -> None:
    """Where no dummy prefix stands there, both models have read the same: nothing of it."""
    target, source = encoders["llama"], encoders["gemma"]
    assert target.vocabulary.space_mark
    assert not target.has_dummy_prefix
    one, ends = asked("Q?", "The end."), np.array([8])
    spans = Spans.of(Ragged(np.array([0, 1]), ends))
    read = []
    for encoder in (target, source):
        (encoded,) = encoder.encode_conversations([one])
        assert encoded.ends is not None
        assert encoded.predicted is not None
        whole = Tokens(np.array([0, len(encoded.ids)]), encoded.ids, encoded.ends)
        read.append(spans.tokens(whole, encoded.predicted))
    for strategy in ("partition", "em"):
        made = STRATEGIES[strategy]
        map_ = made.translate(source, target, None)
        aligned = made.aligner(source, target, map_)(*read)
        assert aligned.source[0] == 0


def test_white_space_that_fits_in_many_ways_ends_soon() -> None:
    texts = [" \n "] * 60
    with pytest.raises(Exception, match="changes what is said"):
        _fillings(" " * 100 + "x", [""] * 61, texts)
    assert _fillings("<a> b", ["<", "> ", ""], ["a", "b"]) == ["a", "b"]


# Records


def test_layouts_of_records_give_the_same_conversation() -> None:
    expected = asked("Q?", "A.", "Q!", "B.")
    openai = [[{"role": m["role"], "content": m["content"]} for m in expected.messages]]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [[{"from": names[m["role"]], "value": m["content"]} for m in expected.messages]]
    parts = [[m | {"content": [{"type": "text", "text": m["content"]}]} for m in openai[0]]]
    for values in (openai, sharegpt, parts, [json.dumps(openai[0])]):
        assert conversation_of(values) == expected
    two = conversation_of([openai[0][:3], openai[0][3:]])
    assert two == replace(expected, learnt=(3,))
    assert conversation_of(["Q?", "A."]) == asked("Q?", "A.")
    assert conversation_of(openai, turns="last").learnt == (3,)
    unanswered = [[*openai[0], {"role": "user", "content": "And?"}]]
    assert conversation_of(unanswered) == expected


def test_thinking_is_kept_or_dropped() -> None:
    thought = [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA."},
    ]
    assert conversation_of([thought]).text == "<think>\nHm.\n</think>\n\nA."
    assert conversation_of([thought], thinking="drop").text == "A."


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "A"}], "message 0 is of assistant, after none"),
        (
            [*[{"role": "user", "content": "Q"}] * 2, {"role": "assistant", "content": "A"}],
            "after one of user",
        ),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "  "}],
            "says nothing",
        ),
        ([{"role": "king", "content": "Q"}], "is of 'king', whom nobody knows"),
        ([{"content": "Q"}], "is of 'None'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts that are no text"),
        ([{"role": "user", "content": 7}], "is a int, and no text"),
        ("plain", "is text, and no list"),
        (None, "is no list of messages"),
        ([1], "is no list of messages"),
    ],
)
def test_what_is_no_conversation_says_why(messages: Any, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        conversation_of([messages])


def test_odd_records_are_left_out_and_not_the_end(tmp_path: Path) -> None:
    good = records(40)
    odd = [
        {"messages": "[" * 3000},
        {"messages": [{"role": "user", "content": "Q", "tool_calls": [{"\ud800": 1}]}]},
        {"messages": [{"role": "assistant", "content": "A"}]},
    ]
    write_records(tmp_path / "chat.jsonl", [*good, *odd])
    fields = Fields.of(FileDocuments(files="x.jsonl", messages="messages"))
    read = list(read_records(tmp_path / "chat.jsonl", kind_of(tmp_path / "chat.jsonl"), fields))
    assert [one.unusable is None for one in read] == [True] * 40 + [False] * 3
    timed = fields.conversation(
        {
            "messages": [
                {"role": "user", "content": "Q", "tool_calls": [{"at": datetime(2026, 1, 1)}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        "here",
    )
    assert isinstance(timed, str)
    assert "cannot be written as JSON" in timed
    (tmp_path / "chat.txt").write_text("Q: A")
    with pytest.raises(CorpusError, match="is text without fields, and messages names some"):
        list(
            read_records(
                tmp_path / "chat.txt",
                kind_of(tmp_path / "chat.txt"),
                Fields.of(FileDocuments(files="chat.txt", messages="text")),
            )
        )


def test_unusable_records_are_counted_where_parts_are_cut_by_place(tmp_path: Path) -> None:
    rows = [*records(5), {"messages": [{"role": "assistant", "content": "A"}]}]
    write_records(tmp_path / "chat.jsonl", rows)
    corpus = CorpusSettings.model_validate(
        {"documents": [{"files": f"{tmp_path}/chat.jsonl", "messages": "messages"}]}
    )
    counts: Counter[str] = Counter()
    texts = list(
        read_documents(corpus.documents[0], corpus, counts, BuiltinReader(corpus, Silent()))
    )
    assert [text.unusable is None for text in texts] == [True] * 5 + [False]
    assert {text.part for text in texts} == {"train", "validation", "held_out"}
    assert counts["empty_documents"] == 0


def test_long_conversations_are_cut_at_whole_turns_from_the_front() -> None:
    one = asked("q" * 10, "a" * 10, "r" * 10, "b" * 10)
    assert within(one, 40) == (one, 0)
    assert within(one, 39) == (asked("r" * 10, "b" * 10), 1)
    short = within(one, 15)
    assert short == (asked("r" * 10, "b" * 5, cut=True), 1)
    assert within(one, 10) is None
    system = ({"role": "system", "content": "s" * 5}, *one.messages)
    told = within(Conversation(system, (2, 4)), 25)
    assert told is not None
    assert [m["content"][0] for m in told[0].messages] == ["s", "r", "b"]
    assert told[0].learnt == (2,)
    tools = ({"name": "tool"},)
    both = replace(one, tools=tools)
    room = 40 + len(json.dumps(tools))
    assert within(both, room) == (both, 0)
    assert within(both, room - 1) == (replace(asked("r" * 10, "b" * 10), tools=tools), 1)
    found = ({"role": "tool", "content": "f" * 30}, {"role": "assistant", "content": "c"})
    looked = Conversation((*asked("q", "a").messages, *found), (1, 3))
    assert within(looked, 20) == (asked("q", "a"), 0)


@given(
    st.lists(st.text(min_size=1, max_size=9), min_size=2, max_size=8).filter(
        lambda t: len(t) % 2 == 0
    ),
    st.integers(1, 60),
)
def test_a_cut_conversation_is_the_end_of_the_whole_one(texts: list[str], most: int) -> None:
    one = asked(*(_whole(text) for text in texts))
    fitting = within(one, most)
    if fitting is None:
        return
    cut, turns = fitting
    assert sum(len(m["content"].encode()) for m in cut.messages) <= most
    assert len(cut.messages) == len(one.messages) - 2 * turns
    assert cut.messages[:-1] == one.messages[2 * turns : -1]
    assert one.messages[-1]["content"].startswith(cut.messages[-1]["content"])
    assert cut.cut == (cut.messages[-1] != one.messages[-1])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"messages": "m", "text_field": "t"}, "text_field is of plain text"),
        ({"messages": "m", "context_fields": ["m"]}, "is of plain text"),
        ({"turns": "last"}, "turns is of conversations"),
        ({"tools_field": "tools"}, "tools_field is of conversations"),
        ({"messages": ["p", "p"]}, "names 'p' twice"),
        ({"messages": ["p"]}, "names a field, or two: of the prompt and of its completion"),
    ],
)
def test_settings_of_another_kind_are_refused(documents: dict[str, Any], message: str) -> None:
    entry = {"files": "x.jsonl"} | documents
    with pytest.raises(RecipeError, match=message):
        check_recipe(_raw([entry]), "here")


def _raw(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "r",
        "target": "zoo/prose",
        "sources": ["zoo/cpp"],
        "corpus": {"documents": documents},
    }


def test_a_conversation_has_a_longest_size() -> None:
    raw = _raw([{"files": "a.jsonl", "messages": "m"}])
    raw["corpus"]["block_bytes"] = 70_000
    with pytest.raises(RecipeError, match="more than a conversation may have, 65535"):
        check_recipe(raw, "here")


def test_plain_text_and_conversations_do_not_mix() -> None:
    documents = [{"files": "a.jsonl", "messages": "m"}, {"files": "b.txt", "domain": "plain"}]
    with pytest.raises(RecipeError, match="'plain' is plain text, and others are conversations"):
        check_recipe(_raw(documents), "here")


# Spans as blocks


def test_spans_are_tokens_with_one_before_each() -> None:
    spans = Spans.of(Ragged(np.array([0, 2, 3]), np.array([3, 5, 4])))
    #         template a  a  end template b  end | template c
    ids = np.array([1, 10, 11, 2, 3, 12, 2, 1, 4, 13])
    ends = np.array([0, 1, 3, 3, 3, 5, 5, 0, 0, 4])
    predicted = np.array([0, 1, 1, 1, 0, 1, 1, 0, 0, 1], dtype=np.bool_)
    tokens = spans.tokens(Tokens(np.array([0, 7, 10]), ids, ends), predicted)
    assert tokens.offsets.tolist() == [0, 4, 7, 9]
    assert tokens.ids.tolist() == [1, 10, 11, 2, 3, 12, 2, 4, 13]
    assert tokens.ends.tolist() == [0, 1, 3, 3, 0, 2, 2, 0, 4]
    assert tokens.prefix_tokens == 1
    predicted[1:4] = False  # the first answer is not learnt from this model
    without = spans.tokens(Tokens(np.array([0, 7, 10]), ids, np.maximum(ends, 0)), predicted)
    assert without.offsets.tolist() == [0, 0, 3, 5]


# A run


@pytest.fixture(scope="module")
def recipe_file(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    rows = records(80)
    rows[3]["messages"][1]["content"] = "  stripped by two templates  "
    rows.append({"messages": [{"role": "assistant", "content": "first"}]})
    write_records(folder / "chat.jsonl", rows)
    raw = {
        "name": "chat",
        "target": str(models / "llama"),
        "sources": [
            {"model": str(models / "chatml"), "name": "chatml", "system": "Be brief."},
            {"model": str(models / "gemma"), "name": "gemma"},
        ],
        "corpus": {
            "documents": [{"files": "chat.jsonl", "messages": "messages", "domain": "chat"}],
            "validation_share": 0.1,
            "held_out_share": 0.1,
            "shard_blocks": 16,
        },
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its recipe to its report."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)
        _opened(recipe_file, run).execute()
    return run


def _opened(recipe_file: Path, run: Path) -> Pipeline:
    return Pipeline(resolve_paths(load_recipe(recipe_file), recipe_file.parent), run, Silent())


def test_what_is_stored_is_what_the_model_says(finished: Path, models: Path) -> None:
    """Log-probabilities of what is learnt, beside those of transformers for the whole."""
    store = open_store(finished / "externalize" / "chatml")
    model = AutoModelForCausalLM.from_pretrained(models / "chatml").eval()
    for block in list(store)[:6]:
        with torch.no_grad():
            log_probs = model(torch.tensor(block.ids)[None]).logits[0].log_softmax(-1)
        for n in range(block.positions):
            at = block.at(n)
            place = int(block.places[n]) if block.places is not None else n
            assert at.token == block.ids[place]
            assert at.true_id == block.ids[place + 1]
            expected = float(log_probs[place, at.true_id])
            assert at.true_log_prob == pytest.approx(expected, abs=0.03)
            assert at.counts.sum() == 32


def test_the_corpus_says_what_it_left_out(finished: Path) -> None:
    corpus = open_corpus(finished)
    assert corpus.counts["unusable_conversations"] == 1
    block = read_shard(corpus, "train-00000.arrow")[0]
    assert block.conversation is not None
    assert block.text == block.conversation.text


def test_what_is_fused_is_at_what_is_learnt(finished: Path, recipe_file: Path) -> None:
    """Parts stand where the target predicts, and the end of a turn has an outcome of its own."""
    pipeline = _opened(recipe_file, finished)
    encoder = pipeline.readers["target"].encoder
    corpus, fused = open_corpus(finished), open_fused(finished)
    tokens = open_externalized(finished, "target")
    ends = 0
    for name in shard_names(corpus, "train-"):
        shard = Shard(fused, name, layout_of(fused))
        for row, encoded in enumerate(encode_blocks(encoder, read_shard(corpus, name))):
            block = shard.block(row)
            assert encoded.predicted is not None
            assert block["ids"].tolist() == encoded.ids.tolist()
            there = block["parts"] > 0
            assert not (there & ~encoded.predicted[1:]).any()
            is_end = encoded.predicted[1:] & (encoded.ids[1:] == encoder.vocabulary.eos_id)
            ends += int(there[is_end].sum())
    assert ends > 50
    assert tokens.complete


def test_bits_per_byte_are_those_of_what_is_learnt(finished: Path, models: Path) -> None:
    """Held-out nats of a source, beside transformers' loss with labels on what is said alone.

    As of plain text, the end is learnt and not measured: it has no bytes.
    """
    body = json.loads((finished / "evaluate" / "results.json").read_text())
    blocks = read_part(open_corpus(finished), "held_out")
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(models / "gemma"))
    model = AutoModelForCausalLM.from_pretrained(models / "gemma").eval()
    nats = scored = 0.0
    for block, encoded in zip(blocks, encode_blocks(encoder, blocks), strict=True):
        ids = torch.tensor(encoded.ids)[None]
        asked = torch.tensor(encoded.predicted)[None] & (ids != encoder.vocabulary.eos_id)
        labels = torch.where(asked, ids, -100)
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        nats += float(loss) * int((labels != -100).sum())
        scored += len(block.text.encode())
    (record,) = (r for r in body["records"] if r["model"] == "gemma" and r["task"] == "chat")
    assert record["value"] == pytest.approx(nats / scored / np.log(2), rel=1e-3)


def test_the_model_speaks_by_its_template(finished: Path) -> None:
    folder = finished / "train" / "fused"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == LLAMA
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked_for = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Well?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = model.generate(**asked_for, max_new_tokens=3, do_sample=False)
    assert written.shape[1] == asked_for["input_ids"].shape[1] + 3


def test_inspect_shows_an_answer(finished: Path, recipe_file: Path, command: Command) -> None:
    pipeline = _opened(recipe_file, finished)
    number = next(
        n
        for n, b in enumerate(read_shard(open_corpus(finished), "train-00000.arrow"))
        if b.conversation is not None and len(b.conversation.learnt) > 1
    )
    args = pipeline.recipe, finished, pipeline.readers, number, None, Silent()
    views = [inspect_block(*args, answer) for answer in (None, 1)]
    for answer, view in enumerate(views):
        assert view.answer == answer
        assert "".join(view.target.spelled[1:-1]) == view.text
        assert view.target.spelled[-1] == ENDS["llama"]
        assert view.asked.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert any(winner is not None for winner in view.winners)
    with pytest.raises(StoreError, match="there is no answer 9"):
        inspect_block(*args, 9)
    code, out, _ = command("inspect", finished, "--block", number, "--answer", 1)
    assert code == 0
    assert "1 of" in next(line for line in out.splitlines() if "answer" in line)


def test_a_model_without_a_template_is_named(
    recipe_file: Path, tmp_path: Path, command: Command
) -> None:
    changed = ["--set", "sources.1.model=zoo/cpp"]
    code, _, error = command("run", recipe_file, "--out", tmp_path / "run", *changed)
    assert code != 0
    assert "cpp' has no chat template, and the corpus is of conversations" in error
    assert not (tmp_path / "run" / "externalize").exists()
    file = tmp_path / "gemma.jinja"
    file.write_text(GEMMA.replace("<start_of_turn>", "").replace("<end_of_turn>", "</s>"))
    given = [*changed, "--set", f"sources.1.chat_template={file}"]
    assert command("corpus", recipe_file, "--out", tmp_path / "run", *given)[0] == 0


def test_conversations_of_parquet_and_of_two_fields(
    recipe_file: Path, models: Path, tmp_path: Path
) -> None:
    rows = records(60)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    two = [
        {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
        for row in rows
    ]
    write_records(tmp_path / "two.jsonl", two)
    raw = yaml.safe_load(recipe_file.read_text())
    raw["corpus"]["documents"] = [
        {"files": "chat.parquet", "messages": "messages", "domain": "one"},
        {"files": "two.jsonl", "messages": ["prompt", "completion"], "domain": "two"},
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    _opened(file, tmp_path / "run").execute(["corpus"])
    corpus = open_corpus(tmp_path / "run")
    said = [b for name in corpus.shards for b in read_shard(corpus, name)]
    by_domain = {d: sorted(b.text for b in said if b.domain == d) for d in ("one", "two")}
    assert by_domain["one"] == sorted(conversation_of([row["messages"]]).text for row in rows)
    assert by_domain["two"] == sorted(row["completion"] for row in two)


def test_a_corpus_whose_conversations_say_another_text_is_refused() -> None:
    batch = {
        "text": np.array(["ab"], dtype=object),
        "spans": Ragged(np.array([0, 1]), np.array([2])),
        "conversation": np.array([asked("Q", "ac").to_json()], dtype=object),
    }
    wrong = BLOCKS.wrong(batch)
    assert wrong is not None
    assert "does not say the block's text" in wrong.what
    batch["conversation"] = np.array([asked("Q", "ab").to_json()], dtype=object)
    assert BLOCKS.wrong(batch) is None
    batch["spans"] = Ragged(np.array([0, 1]), np.array([1]))
    wrong = BLOCKS.wrong(batch)
    assert wrong is not None
    assert "are not a text of 2 bytes" in wrong.what


def test_an_ensemble_of_conversations_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    raw = {
        "name": "s",
        "recipe": str(recipe_file),
        "arms": {"clm": {"train": "clm"}, "all": {"ensemble": {}}},
    }
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(RecipeError, match="arm all is an ensemble, which reads plain text alone"):
        run_study(file, tmp_path / "out")


def test_a_shard_of_which_nothing_can_be_read_is_written(recipe_file: Path, tmp_path: Path) -> None:
    rows = records(60)
    for row in rows:
        if part_by_hash(conversation_of([row["messages"]]).text, _shares(recipe_file)) == "train":
            row["messages"].insert(0, {"role": "system", "content": "Brief."})
            break
    write_records(tmp_path / "chat.jsonl", rows)
    raw = yaml.safe_load(recipe_file.read_text())
    raw["corpus"]["shard_blocks"] = 1
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    pipeline = _opened(file, tmp_path / "run")
    pipeline.execute(["corpus", "externalize", "fuse"])
    store = open_store(tmp_path / "run" / "externalize" / "gemma")
    unread = [block for block in store if not block.usable]
    assert [block.reason for block in unread] == [
        "its chat template raises: System role not supported"
    ]
    assert unread[0].positions == 0


def _shares(recipe_file: Path) -> CorpusSettings:
    return load_recipe(recipe_file).corpus


def test_more_than_a_share_of_changed_conversations_is_an_error(
    recipe_file: Path, tmp_path: Path, models: Path
) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "S"}, *row["messages"]]} for row in records(40)
    ]
    write_records(tmp_path / "chat.jsonl", rows)
    raw = yaml.safe_load(recipe_file.read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(FusellmError, match=r"'gemma' changes .* raises: System role not supported"):
        _opened(file, tmp_path / "run").execute()


# Longer than a context


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_read_as_far_as_the_context_goes(
    models: Path, encoders: dict[str, ChatEncoder], name: str
) -> None:
    """Beside the whole: its beginning, and the same is learnt of that, but for the last token."""
    one = asked(
        "Who?", "The list of values, é…", "And?", "A function.", "What?", "  ", "So?", "It."
    )
    (whole,) = encoders[name].encode_conversations([one])
    assert whole.ends is not None
    assert whole.predicted is not None
    assert whole.left_out == 0
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    first = int(whole.predicted.argmax())
    for most in range(1, len(whole.ids) + 2):
        cut = ChatEncoder(tokenizer, context_tokens=most)
        (own,) = cut.encode_conversations([one])
        assert own.ids.tolist() == whole.ids[:most].tolist()
        assert own.left_out == max(len(whole.ids) - most, 0)
        if own.left_out and most < first + 2:
            assert own.ends is None
            assert own.reason is not None
            assert f"within the {most} tokens" in own.reason
            continue
        assert own.ends is not None
        assert own.predicted is not None
        last = most - 1 if own.left_out else most
        assert own.ends[:last].tolist() == whole.ends[:last].tolist()
        assert own.predicted[:last].tolist() == whole.predicted[:last].tolist()
        assert own.ends[-1] == len(one.text.encode())
        assert not own.left_out or not own.predicted[-1]


def _shorter(models: Path, name: str, context: int, folder: Path) -> Path:
    """A model with another context."""
    shutil.copytree(models / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_learns_from_each_model_as_far_as_its_context_goes(
    recipe_file: Path, models: Path, tmp_path: Path
) -> None:
    """Of a source all that it has read, and nothing behind; of the target no row is too long."""
    raw = yaml.safe_load(recipe_file.read_text())
    raw["corpus"]["documents"][0]["files"] = str(recipe_file.parent / "chat.jsonl")
    raw["externalize"] = {"changed_share": 0.2}
    raw["target"] = str(_shorter(models, "llama", 150, tmp_path / "target"))
    raw["sources"][0]["model"] = str(_shorter(models, "chatml", 100, tmp_path / "chatml"))
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(raw))
    told = Told()
    pipeline = Pipeline(resolve_paths(load_recipe(file), tmp_path), run, told)
    checked = pipeline.check()["models"]
    assert checked["chatml"]["blocks_cut"] > checked["target"]["blocks_cut"] > 0
    assert checked["gemma"]["blocks_cut"] == 0
    assert not checked["target"]["every_block_fits"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)
        pipeline.execute()
    train = read_part(open_corpus(run), "train")
    for name, context in (("target", 150), ("chatml", 100)):
        encoder = ChatEncoder(pipeline.readers[name].encoder.tokenizer, system=_told_first(name))
        long = [e for e in encode_blocks(encoder, train) if len(e.ids) > context]
        line = f"{name}: {len(long)} of {len(train)} conversations are longer than its context of"
        assert any(line in one for one in told.lines)
    model = AutoModelForCausalLM.from_pretrained(models / "chatml").eval()
    at_the_limit = 0
    for kept in open_store(run / "externalize" / "chatml"):
        if len(kept.ids) < 100:
            continue
        assert len(kept.ids) == 100
        if not kept.usable:
            continue
        at_the_limit += 1
        at = kept.at(kept.positions - 1)
        assert kept.places is not None
        place = int(kept.places[-1])
        assert place < 98  # the last token of the context is read and not learnt
        with torch.no_grad():
            log_probs = model(torch.tensor(kept.ids)[None]).logits[0].log_softmax(-1)
        assert at.true_log_prob == pytest.approx(float(log_probs[place, at.true_id]), abs=0.03)
    assert at_the_limit > 10
    assert fusellm.FusedDataset(run).longest_text == 150
    assert StageFolder(run / "externalize" / "target").identity.inputs["context"] == "150"
    blocks = read_part(open_corpus(run), "held_out")
    common = [np.ones(len(block.text.encode()), dtype=bool) for block in blocks]
    for reader in pipeline.readers.values():
        for own, encoded in zip(common, encode_blocks(reader.encoder, blocks), strict=True):
            own &= _is_predicted(encoded, len(own))
    body = json.loads((run / "evaluate" / "results.json").read_text())
    scored = sum(int(own.sum()) for own in common)
    assert body["notes"]["bytes"] == {"chat": scored}
    assert 0 < scored < sum(map(len, common))
    args = pipeline.recipe, run, pipeline.readers, _cut_block(run), None, Silent()
    assert [inspect_block(*args, answer).answer for answer in (0, None)] == [0, 0]


def _is_predicted(encoded: Encoded, length: int) -> np.ndarray:
    """[L] bool, which bytes of the shared text a model predicts."""
    own = np.zeros(length, dtype=bool)
    if encoded.ends is not None and encoded.predicted is not None:
        for n in np.flatnonzero(encoded.predicted):
            own[encoded.ends[n - 1] : encoded.ends[n]] = True
    return own


def _cut_block(run: Path) -> int:
    """The number of a block that a source has not read to its end."""
    return next(
        one.number
        for one in open_store(run / "externalize" / "chatml")
        if one.usable and len(one.ids) == 100
    )


def _told_first(name: str) -> str | None:
    return "Be brief." if name == "chatml" else None


@dataclass(frozen=True)
class Short:
    """Conversations that a source of 90 tokens has read, and one that has room for all."""

    messages: list[Any]
    target: fusellm.Tokenizer
    whole: fusellm.SourceDistributions
    short: fusellm.SourceDistributions
    others: dict[str, fusellm.SourceDistributions]

    def until(self, number: int) -> int | None:
        """Bytes of the shared text that were read; None where all were."""
        read = self.short[number]
        if len(read.ids) < 90:
            return None
        places = read.places if read.usable else None
        return 0 if places is None else int(read.ends[places[-1] + 1])


def _long_ones() -> list[list[dict[str, str]]]:
    """Some that end with a context of 90 tokens within an answer, some between two, some before."""
    rows = [row["messages"] for row in records(6, seed=3)]
    for n in (1, 2, 4):  # all that is said in an answer, and one more
        said = " ".join(m["content"] for row in rows for m in row if m["role"] == "assistant")
        answer = {"role": "assistant", "content": said[10 * n :]}
        rows.append([*rows[n], rows[n][0], answer, rows[0][0], rows[0][1]])
    return rows


@pytest.fixture(scope="module")
def short(models: Path) -> Short:
    messages = _long_ones()
    target = fusellm.Tokenizer.from_pretrained(models / "llama")
    model, tokenizer = fusellm.load_pretrained(models / "chatml", device="cpu")
    whole = fusellm.read_distributions(model, tokenizer, messages)
    model.config.max_position_embeddings = 90
    read = fusellm.read_distributions(model, tokenizer, messages)
    with pytest.raises(ArgumentError, match=r"text \d has \d+ tokens, .* context is 90; cut"):
        fusellm.bits_per_byte(model, tokenizer, messages)
    others = {}
    for name in ("gemma", "llama"):
        other, own = fusellm.load_pretrained(models / name, device="cpu")
        others[name] = fusellm.read_distributions(other, own, messages)
    return Short(messages, target, whole, read, others)


@pytest.mark.parametrize(
    ("strategy", "refine"),
    [("partition", "none"), ("partition", "path"), ("bpm", None), ("bytes", "none")],
)
def test_what_was_read_is_fused_as_if_all_had_been(
    short: Short, strategy: str, refine: str | None
) -> None:
    """Oracle: the same source with room for the whole."""
    how: dict[str, Any] = {"function": "uniform", "strategy": strategy}
    how |= {} if refine is None else {"refine": refine}
    by_whole, by_short = (
        fusellm.fuse(short.messages, short.target, {"chatml": one}, **how)
        for one in (short.whole, short.short)
    )
    blocks = fusellm.FusedDataset(by_whole)._blocks, fusellm.FusedDataset(by_short)._blocks
    compared = silent = 0
    for number in range(len(short.messages)):
        encoded, until = by_whole.encoded[number], short.until(number)
        assert encoded.ends is not None
        assert encoded.predicted is not None
        own, other = (one.block(number) for one in blocks)
        assert np.array_equal(own["ids"], other["ids"])
        for n in np.flatnonzero(encoded.predicted[1:]):
            if until is not None and encoded.ends[n + 1] > until:  # not all of what comes next
                silent += 1
                assert other["parts"][n] == 0 or until > encoded.ends[n]
                if strategy in ("partition", "bpm"):
                    assert not other["parts"][n] or short.short[number].ends[-2] > encoded.ends[n]
            elif until is None or encoded.ends[n + 1] < until - 16:  # so long no path is
                compared += 1
                assert own["parts"][n] == other["parts"][n]
                first, second = by_whole.at(number, n), by_short.at(number, n)
                assert [(o.tokens, pytest.approx(o.mass)) for o in first] == [
                    (o.tokens, o.mass) for o in second
                ]
    assert compared > 50
    assert silent > 20


@pytest.mark.parametrize(
    "how",
    [
        {"function": "mince"},
        {"function": "mince", "granularity": "block"},
        {"function": "avgce", "beta": 2.0},
        {"function": "bayes"},
        {"function": "mince", "referees": ["llama"]},
        {"function": "mince", "strategy": "em"},
        {"function": "mince", "strategy": "mined"},
    ],
)
def test_behind_a_context_the_others_are_heard_as_if_alone(
    short: Short, how: dict[str, Any]
) -> None:
    """Oracle: the same fusion without the source that has stopped."""
    of_all = {"chatml": short.short, **short.others}
    by_all = fusellm.fuse(short.messages, short.target, of_all, **how)
    alone = fusellm.fuse(short.messages, short.target, short.others, **how)
    behind = 0
    for number in range(len(short.messages)):
        encoded, until = by_all.encoded[number], short.until(number)
        assert encoded.ends is not None
        assert encoded.predicted is not None
        if until is None:
            continue
        for n in np.flatnonzero(encoded.predicted[1:]):
            if encoded.ends[n] >= until and encoded.ends[n + 1] > until:
                behind += 1
                first, second = by_all.at(number, n), alone.at(number, n)
                assert all(one.source != "chatml" for one in first)
                assert [(o.source, o.tokens, o.mass) for o in first] == [
                    (o.source, o.tokens, pytest.approx(o.mass)) for o in second
                ]
    assert behind > 20


def test_a_source_that_breaks_off_within_the_next_piece_is_silent() -> None:
    """It has read "the ", and "ca" of "cats"; it does not say what ends with it."""
    target, source = np.array([0, 4, 8]), np.array([0, 4, 6])
    offsets = np.array([0, 3])
    positions, situations = align_shard(target, offsets, source, offsets)
    assert positions.tolist() == [0, -1]
    assert situations.tolist() == [Situation.SAME, Situation.UNALIGNED]


def test_by_the_authors_rules_nothing_is_taught_of_what_was_not_read(short: Short) -> None:
    """Where a source is not aligned they repeat the token that was read last; here it has none."""
    how = {"strategy": "em", "compatibility": "paper", "cross_entropy": "nats_per_token"}
    settings: dict[str, Any] = how | {"token_healing": False, "granularity": "block"}
    fused = fusellm.fuse(short.messages, short.target, {"chatml": short.short}, **settings)
    told = silent = 0
    for number in range(len(short.messages)):
        encoded, until = fused.encoded[number], short.until(number)
        assert encoded.ends is not None
        assert encoded.predicted is not None
        for n in np.flatnonzero(encoded.predicted[1:]):
            is_known = until is None or encoded.ends[n + 1] <= until
            is_behind = until is not None and encoded.ends[n] >= until
            assert not is_known or fused.at(number, n)
            assert is_known or not is_behind or not fused.at(number, n)
            told, silent = told + is_known, silent + (is_behind and not is_known)
    assert told > 50
    assert silent > 20


def test_a_prompt_is_as_long_as_it_is(models: Path) -> None:
    """Whether a model has room for an answer is judged by all of its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(models / "chatml")
    whole = ChatEncoder(tokenizer)
    asks = Conversation(({"role": "user", "content": "the list " * 40},), ())
    (ids,) = whole.prompt_ids([asks])
    for context in (20, len(ids), len(ids) + 1):
        (same,) = ChatEncoder(tokenizer, context_tokens=context).prompt_ids([asks])
        assert isinstance(same, np.ndarray)
        assert same.tolist() == list(ids)


def test_a_short_encoder_is_told_of_and_trained_with(models: Path) -> None:
    model, tokenizer = fusellm.load_pretrained(models / "llama", device="cpu")
    messages = _long_ones()
    encoder = tokenizer.for_chat(context_tokens=90)
    with pytest.raises(ArgumentError, match=r"text \d has \d+ tokens, .* context is 90; cut"):
        fusellm.bits_per_byte(model, encoder, messages)
    read = {"llama": fusellm.read_distributions(model, tokenizer, messages)}
    fused = fusellm.fuse(messages, encoder, read)
    dataset = fusellm.FusedDataset(fused)
    assert dataset.longest_text == 90
    known = fusellm.fuse(messages, tokenizer, read)
    for number, (own, whole) in enumerate(zip(fused.encoded, known.encoded, strict=True)):
        if own.predicted is None:
            continue
        for n in np.flatnonzero(own.predicted[1:])[:-16]:
            assert [(o.tokens, o.mass) for o in fused.at(number, n)] == [
                (o.tokens, pytest.approx(o.mass)) for o in known.at(number, n)
            ]
        assert whole.ids[: len(own.ids)].tolist() == own.ids.tolist()


# In memory


def test_in_memory_conversations_are_read_and_fused_as_in_a_run(
    finished: Path, models: Path, recipe_file: Path
) -> None:
    """Oracle: the stores of the run, from the same conversations."""
    blocks = read_part(open_corpus(finished), "train")[:24]
    conversations = [block.conversation for block in blocks]
    asked_of = [one for one in conversations if one is not None]
    sources = {}
    for name in ("chatml", "gemma"):
        model, tokenizer = fusellm.load_pretrained(models / name, device="cpu")
        system = "Be brief." if name == "chatml" else None
        read = fusellm.read_distributions(model, tokenizer.for_chat(system=system), asked_of)
        stored = fusellm.open_store(finished / "externalize" / name)
        for block, own in zip(blocks, read, strict=True):
            kept = stored[block.number]
            assert own.usable == kept.usable
            assert np.array_equal(own.ends, kept.ends)
            if own.usable:
                assert np.array_equal(own.ids, kept.ids)
                assert own.places is not None
                assert np.array_equal(own.places, kept.places)
                assert own.positions == kept.positions
                first, other = own.at(0), kept.at(0)
                assert np.array_equal(first.ids, other.ids)
                assert first.true_log_prob == pytest.approx(other.true_log_prob, abs=1e-2)
        sources[name] = read
    target = fusellm.Tokenizer.from_pretrained(models / "llama")
    fused = fusellm.fuse(asked_of, target.for_chat(), sources)
    by_run = fusellm.FusedDataset(finished)
    in_memory = fusellm.FusedDataset(fused)
    assert in_memory.lengths.tolist() == by_run.lengths[: len(blocks)].tolist()
    for number in range(len(blocks)):
        own, other = in_memory._blocks.block(number), by_run._blocks.block(number)
        assert np.array_equal(own["ids"], other["ids"])
        assert np.array_equal(own["context"], other["context"])
        assert np.array_equal(own["parts"] > 0, other["parts"] > 0)
    assert 0 < sum(fused.won.values()) <= 1 + 1e-9
    assert 0.5 < fused.aligned["chatml"] <= 1


def test_a_program_trains_on_conversations(models: Path) -> None:
    """Messages as OpenAI has them, to a loss that falls."""
    messages = [row["messages"] for row in records(12)]
    model, tokenizer = fusellm.load_pretrained(models / "chatml", device="cpu")
    read = {"chatml": fusellm.read_distributions(model, tokenizer, messages)}
    assert read["chatml"].conversations is not None
    target, own = fusellm.load_pretrained(models / "llama", device="cpu")
    before = fusellm.bits_per_byte(target, own, messages)
    dataset = fusellm.FusedDataset(fusellm.fuse(messages, own, read), row_tokens=1024)
    batch = fusellm.FusionCollator(dataset)([dataset[0]])
    text = sum(len(c.text) for c in map(fusellm.Conversation.of, messages))
    assert 0 < int((batch["labels"] != -100).sum()) < text
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = fusellm.last_hidden(target, batch)
        loss = fusellm.fusion_loss(hidden, target, batch["labels"], batch["outcomes"], 0.5)
        loss.backward()
        optimizer.step()
    after = fusellm.bits_per_byte(target.eval(), own, messages)
    assert after.value < before.value
    assert before.scored_bytes.tolist() == [
        len(fusellm.Conversation.of(one).text.encode()) for one in messages
    ]


def test_of_what_the_target_cannot_read_nothing_is_learnt(models: Path) -> None:
    """Gemma's template trims; the others are learnt as ever."""
    rows = [row["messages"] for row in records(6)]
    stripped = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " a \n"}]
    model, tokenizer = fusellm.load_pretrained(models / "chatml", device="cpu")
    given_rows = [*rows[:3], stripped, *rows[3:]]
    read = {"chatml": fusellm.read_distributions(model, tokenizer, given_rows)}
    target = fusellm.Tokenizer.from_pretrained(models / "gemma")
    fused = fusellm.fuse(given_rows, target, read)
    assert fused.encoded[3].ends is None
    dataset = fusellm.FusedDataset(fused)
    assert [row[0] for row in dataset.rows] == [0, 1, 2, 4, 5, 6]
    assert dataset._blocks.block(3)["context"].all()
    assert not dataset._blocks.block(4)["context"].all()
    alone = fusellm.FusedDataset(
        fusellm.fuse(rows, target, {"chatml": fusellm.read_distributions(model, tokenizer, rows)})
    )
    for number, other in ((2, 2), (4, 3), (6, 5)):
        own, same = dataset._blocks.block(number), alone._blocks.block(other)
        assert all(np.array_equal(own[name], same[name]) for name in own if name != "block")
    with pytest.raises(TokenizerError, match="changes text 3"):
        fusellm.bits_per_byte(*fusellm.load_pretrained(models / "gemma", device="cpu"), given_rows)
    twice = [[*rows[0][:2], *stripped]]
    with pytest.raises(TokenizerError, match="changes text 0"):  # one of its answers
        fusellm.bits_per_byte(*fusellm.load_pretrained(models / "gemma", device="cpu"), twice)


def test_messages_are_read_as_those_of_a_corpus() -> None:
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"from": "human", "value": "half \ud83d"},
        {"role": "assistant", "content": None, "tool_calls": [called], "name": None},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>Hm.</think>Four."},
        {"role": "user", "content": "unanswered"},
    ]
    one = Conversation.of(messages, thinking="drop")
    assert one == conversation_of([messages], thinking="drop")
    assert one.text == "Four."
    assert one.messages[1]["content"] == "half ?"
    assert one.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    with pytest.raises(ArgumentError, match="turns='Last' is none of all, last"):
        Conversation.of(messages, turns="Last")
    by_hand = Conversation(({"role": "assistant", "content": "\ud83d"},), (0,))
    with pytest.raises(ArgumentError, match="conversation 0 has what is no text"):
        GivenTexts.of([by_hand])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"role": "user", "content": "a"}, "this is one text"),
        ([[{"role": "user", "content": "a"}]], "conversation 0: it cannot be learnt from: the as"),
        ([[{"role": "assistant", "content": "a"}]], "message 0 is of assistant, after none"),
        ([[{"content": "a"}]], "a message is of 'None', whom nobody knows"),
        (
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "c"],
            "text 1",
        ),
    ],
)
def test_what_a_program_gives_wrongly_is_told(models: Path, texts: Any, message: str) -> None:
    model, tokenizer = fusellm.load_pretrained(models / "chatml", device="cpu")
    with pytest.raises(ArgumentError, match=message):
        fusellm.read_distributions(model, tokenizer, texts)
    with pytest.raises(ArgumentError, match="this tokenizer reads conversations"):
        fusellm.read_distributions(model, tokenizer.for_chat(), ["plain"])


def test_the_explorer_shows_answers_one_by_one(finished: Path) -> None:
    """Positions are those that were fused, by answer, and models read the whole conversation."""
    run = Run(finished)
    opened = OpenedRun(run.recipe, finished)
    counts = json.loads((finished / "fuse" / "counts.json").read_text(encoding="utf-8"))
    documents = wins_of_documents(run.recipe, finished, Silent())
    assert sum(one.positions for one in documents) == sum(
        own["positions"] for own in counts["domains"].values()
    )
    first = opened.block(2, 0)
    assert first.answers > 1
    asked = set()
    for answer in range(first.answers):
        view = opened.block(2, answer)
        said = opened.predictions(2, answer).wait()
        assert said is not None
        assert [len(one["true"]) for one in said] == [view.positions] * len(said)
        inspector = opened.inspector.wait()
        assert inspector is not None
        ids, start = inspector.read_by_target(2, answer)
        own = ids[start + 1 : start + 1 + view.positions].tolist()
        assert own == list(view.target.ids[1 : 1 + view.positions])
        asked.add(start)
    assert len(asked) == first.answers
