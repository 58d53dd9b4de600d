"""Answers that models write, and rounds of them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import fusellm
from chats import FAMILIES, asked, make_models, records, write_records
from fusellm.cli.main import app
from fusellm.config import FileDocuments, GeneratedSettings
from fusellm.corpus.fields import Fields
from fusellm.corpus.formats import FileRecord, kind_of, read_records
from fusellm.corpus.generated import _prompt_of, with_answers
from fusellm.corpus.parts import Text
from fusellm.errors import (
    CorpusError,
    FusellmError,
    IdentityError,
    ModelError,
    RecipeError,
    StoreError,
)
from fusellm.models.readers import reader_of
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.reading.writing import Writer
from fusellm.recipe_file import check_recipe, load_recipe, resolve_paths
from fusellm.rounds import rounds_of
from fusellm.store.answers import GeneratedAnswer, read_answers
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.manifest import StageFolder
from fusellm.study.run import run_study
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.conversation import Conversation, UnusableError, prompt_of

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def recipe_of(models: Path, tmp_path: Path) -> Made:
    """Writes a recipe; `generated` and other keys of its only entry are given."""

    def make(rows: list[dict[str, Any]] | None = None, rounds: int = 1, **entry: Any) -> Path:
        write_records(tmp_path / "chat.jsonl", records(40) if rows is None else rows)
        given = {"files": "chat.jsonl", "messages": "messages", "domain": "chat"} | entry
        if given.get("messages") is None:
            del given["messages"]
        raw = {
            "name": "chat",
            "rounds": rounds,
            "target": str(models / "llama"),
            "sources": [{"model": str(models / "chatml"), "name": "chatml"}],
            "corpus": {
                "documents": [given],
                "validation_share": 0.15,
                "held_out_share": 0.15,
                "shard_blocks": 8,
            },
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return file

    return make


def opened(file: Path, run: Path) -> Pipeline:
    return Pipeline(resolve_paths(load_recipe(file), file.parent), run, Silent())


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few prompts, so that there are several."""
    monkeypatch.setattr("fusellm.stages.generate.SHARD_PROMPTS", 8)


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)


GREEDY = {"temperature": 0, "max_new_tokens": 6}


def test_what_is_trained_on_is_what_the_target_answers(
    recipe_of: Made, models: Path, tmp_path: Path
) -> None:
    """Oracle: transformers' own template and generation, one prompt at a time."""
    run = tmp_path / "run"
    opened(recipe_of(generated=GREEDY), run).execute(("generate", "corpus"))
    corpus = open_corpus(run)
    model, encoder = fusellm.load_pretrained(models / "llama", device="cpu")
    tokenizer = encoder.tokenizer
    trained = read_part(corpus, "train")
    assert len(trained) > 20
    for block in trained:
        assert block.conversation is not None
        *question, answer = block.conversation.messages
        assert block.text == answer["content"]
        assert block.conversation.cut  # these models have not learnt to end a turn
        ids = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=0,
            )
        expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["content"].strip() == expected.strip()
    said = {text for row in records(40) for m in row["messages"] if (text := m["content"])}
    for part in ("validation", "held_out"):
        measured = read_part(corpus, part)
        assert measured
        for block in measured:  # what is measured on is what records say themselves
            assert block.conversation is not None
            assert {m["content"] for m in block.conversation.messages} <= said


def test_text_goes_on_as_a_base_model_writes_it(recipe_of: Made, tmp_path: Path) -> None:
    rows = [{"q": f"def f{n}(value):", "a": f" return value + {n}"} for n in range(30)]
    run = tmp_path / "run"
    file = recipe_of(
        rows,
        messages=None,
        text_field=["q", "a"],
        context_fields=["q"],
        field_separator="\n",
        generated=GREEDY | {"by": "chatml"},
    )
    opened(file, run).execute(("generate", "corpus"))
    trained = read_part(open_corpus(run), "train")
    model, encoder = fusellm.load_pretrained("zoo/python", device="cpu")
    for block in trained:
        question = block.text[: block.text.index("\n") + 1]
        assert block.context == ((0, len(question)),)
        (first,) = encoder.encode([question], [False])
        ids = torch.from_numpy(np.asarray(first.ids))[None]
        with torch.no_grad():
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=0,
            )
        tokens = [encoder.vocabulary.token_bytes[i] for i in written[0, ids.shape[1] :].tolist()]
        data = b"".join(token for token in tokens if token is not None)
        assert block.text == question + data.decode("utf-8", "replace")
    held_out = read_part(open_corpus(run), "held_out")
    assert held_out
    assert all(" return value" in block.text for block in held_out)


def _interrupted_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusellm.stages import generate

    write, count = generate.write_answers, [0]

    def stop(*given: Any) -> None:
        if count[0] == shards:
            raise KeyboardInterrupt
        count[0] += 1
        write(*given)

    monkeypatch.setattr(generate, "write_answers", stop)


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 5, "seed": 3}


def test_what_was_written_is_kept_and_the_rest_is_the_same(
    recipe_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_of(generated=SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opened(file, whole).execute(("generate",))
    with monkeypatch.context() as patch:
        _interrupted_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            opened(file, cut).execute(("generate",))
    assert len(StageFolder(cut / "generate" / "0").shards) == 2
    with pytest.raises(StoreError, match="fusellm generate"):
        opened(file, cut).execute(("corpus",))
    opened(file, cut).execute(("generate",))
    assert [*read_answers(whole, 0)] == [*read_answers(cut, 0)]
    of_both = [StageFolder(run / "generate" / "0").fingerprint for run in (whole, cut)]
    assert of_both[0] == of_both[1]
    answers = [one.text for one in read_answers(whole, 0)]
    assert len(set(answers)) > len(answers) // 2  # they are sampled

    def refuse(*_: Any) -> None:
        raise AssertionError("it is made anew")

    monkeypatch.setattr(Writer, "write", refuse)
    opened(file, whole).execute(("generate", "corpus"))
    other = recipe_of(generated=SAMPLED | {"batch_size": 3})
    opened(other, whole).execute(("generate",))  # how many at a time makes nothing anew
    with pytest.raises(IdentityError, match="temperature"):
        opened(recipe_of(generated=SAMPLED | {"temperature": 0.5}), whole).execute(("generate",))


def test_prompts_need_no_answers_of_their_own(
    recipe_of: Made, models: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {n}?" if n % 2 else [{"role": "user", "content": f"And {n}?"}]}
        for n in range(12)
    ]
    rows += [{"prompt": 3}, {"prompt": [{"role": "assistant", "content": "nobody asked"}]}]
    file = recipe_of(rows, messages="prompt", generated=GREEDY | {"prompts": 9})
    run = tmp_path / "run"
    with pytest.raises(CorpusError, match="no record with an answer of its own"):
        opened(file, run).execute(("generate", "corpus"))
    assert not (run / "generate" / "0" / "answers-00000.arrow").exists()
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    write_records(tmp_path / "own.jsonl", records(30))
    raw["corpus"]["documents"].append(
        {"files": "own.jsonl", "messages": "messages", "domain": "own"}
    )
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    opened(file, run).execute(("generate", "corpus"))
    assert len([*read_answers(run, 0)]) == 9
    blocks = read_part(open_corpus(run), "train")
    own = [b.conversation for b in blocks if b.domain == "chat"]
    asked_of = [one.messages[0]["content"] for one in own if one is not None]
    assert asked_of == [f"What is {n}?" if n % 2 else f"And {n}?" for n in range(9)]
    counts = open_corpus(run).counts
    assert counts["prompts_without_answer"] == 3
    assert counts["unusable_conversations"] == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_text_up_to_the_end_of_a_turn(name: str, models: Path) -> None:
    from fusellm.config import ModelSettings

    reader = reader_of(ModelSettings(model=str(models / name)), chat=True)
    encoder = reader.encoder
    assert isinstance(encoder, ChatEncoder)
    model, _ = fusellm.load_pretrained(models / name, device="cpu")
    writer = Writer(model, encoder, None, GeneratedSettings(max_new_tokens=8))
    said = "The list of values"
    (whole,) = encoder.encode_conversations([asked("Which?", said)])
    assert whole.predicted is not None
    ids = whole.ids[whole.predicted].tolist()  # an answer, and the end of its turn
    assert encoder.vocabulary.eos_id == ids[-1]
    special = int(whole.ids[~whole.predicted][0])
    ended = writer._read([*ids, *ids], is_answer=True)
    assert (ended.text, ended.ends, ended.tokens) == (said, True, len(ids) - 1)
    other = writer._read([*ids[:-1], special, *ids], is_answer=True)
    assert (other.text, other.ends) == (said, special == ids[-1] or special in writer._ends)
    cut = writer._read(ids[:-1], is_answer=True)
    assert (cut.text, cut.ends) == (said, False)
    before, answer = (
        whole.ids[: int(whole.predicted.argmax())],
        encoder.prompt_ids([prompt_of(["Which?"])])[0],
    )
    assert not isinstance(answer, str)
    assert before.tolist() == answer.tolist()


def test_a_character_that_is_cut_is_left_out(models: Path) -> None:
    model, encoder = fusellm.load_pretrained("zoo/python", device="cpu")
    writer = Writer(model, encoder, None, GeneratedSettings(max_new_tokens=8))
    (whole,) = encoder.encode(["naïve 你"], [False])
    text = writer._read(whole.ids.tolist()[:-1], is_answer=False).text
    assert "naïve 你".startswith(text.rstrip())
    assert "\ufffd" not in text


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[]], "nobody asks"),
        ([[{"role": "system", "content": "Be brief."}]], "nobody asks"),
        ([[{"role": "assistant", "content": "Hello."}]], "nobody asks"),
        ([[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]], "after one of"),
        ([7], "no list of messages"),
    ],
)
def test_what_is_no_prompt_says_why(values: list[Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        prompt_of(values)


def test_a_prompt_is_all_that_comes_before_the_last_answer() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert [m["content"] for m in prompt_of([messages]).messages] == ["a", "b", "c"]
    assert prompt_of([messages[:3]]) == prompt_of([json.dumps(messages)])
    assert prompt_of([messages[:3], "d"]) == prompt_of([messages])


BASE = {
    "name": "x",
    "target": "zoo/prose",
    "sources": [{"model": "zoo/python", "name": "python"}],
}
PROMPTS = {"files": "p.jsonl", "messages": "prompt"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"generated": {"by": "nobody"}}, "there is no model 'nobody'; there are target, python"),
        ({"generated": {"temperatur": 1}}, "did you mean temperature"),
        ({"rounds": 2}, "rounds: 2 repeat what is generated, and nothing is"),
        (
            {
                "generated": {},
                "messages": None,
                "text_field": ["a", "q"],
                "context_fields": ["q"],
            },
            "name them first in text_field",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(raw: dict[str, Any], message: str) -> None:
    rounds = raw.pop("rounds", 1)
    entry = {key: value for key, value in (PROMPTS | raw).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        check_recipe(BASE | {"rounds": rounds, "corpus": {"documents": [entry]}}, "recipe.yaml")


def test_who_generates_nothing_is_told(recipe_of: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="generates nothing"):
        opened(recipe_of(), tmp_path / "run").execute(("generate",))
    told = invoke("check", str(recipe_of(generated=GREEDY, rounds=2)), "--out", str(tmp_path / "x"))
    assert told.exit_code == 0, told.output
    assert not (tmp_path / "x").exists()


def test_a_model_that_cannot_answer_says_so(recipe_of: Made, tmp_path: Path) -> None:
    file = recipe_of(generated={"max_new_tokens": 1_000_000})
    with pytest.raises(ModelError, match="leaves no room for a prompt"):
        opened(file, tmp_path / "run").execute(("generate",))
    file = recipe_of(generated=GREEDY | {"max_new_tokens": 1_279})  # of 1,280
    with pytest.raises(CorpusError, match="has answered none of"):
        opened(file, tmp_path / "run2").execute(("generate",))
    file = recipe_of([{"messages": []}], generated=GREEDY)
    with pytest.raises(FusellmError, match="no record with an answer of its own"):
        opened(file, tmp_path / "run3").execute(("generate",))


def test_changed_documents_are_not_answered_by_others(
    recipe_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a dataset of the hub, whose name stays while it moves on."""
    file, run = recipe_of(generated=GREEDY), tmp_path / "run"
    opened(file, run).execute(("generate",))
    rows = records(40)
    rows[7]["messages"][0]["content"] = "Another question."
    write_records(tmp_path / "chat.jsonl", rows)
    monkeypatch.setattr("fusellm.stages.generate.digest_of_files", lambda *_: "same")
    monkeypatch.setattr("fusellm.stages.corpus.digest_of_files", lambda *_: "same")
    shutil.rmtree(run)
    write_records(tmp_path / "chat.jsonl", records(40))
    opened(file, run).execute(("generate",))
    write_records(tmp_path / "chat.jsonl", rows)
    with pytest.raises(StoreError, match="which is another prompt now, or none"):
        opened(file, run).execute(("corpus",))


def test_what_was_asked_is_what_stands_before_the_answer(recipe_of: Made, tmp_path: Path) -> None:
    """Long conversations lose the same turns when they are asked and when they are learnt."""
    long = "the list of values is returned by a function when an index falls outside of it. " * 3
    rows = [
        {"messages": [{"role": r, "content": f"{n} {long}"} for _ in "abc" for r in ROLES]}
        for n in range(30)
    ]
    file, run = recipe_of(rows, generated=GREEDY), tmp_path / "run"
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["corpus"]["block_bytes"] = 1100  # of some 1,500
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    asked: dict[str, int] = {}
    write = Writer.write

    def told(self: Writer, prompts: Any, *more: Any) -> Any:
        written = write(self, prompts, *more)
        asked.update(
            {one.text.strip(): len(p.messages) for p, one in zip(prompts, written, strict=True)}
        )
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write", told)
        opened(file, run).execute(("generate", "corpus"))
    blocks = read_part(open_corpus(run), "train")
    assert blocks
    for block in blocks:
        assert block.conversation is not None
        assert len(block.conversation.messages) == asked[block.text] + 1 < 6
        assert sum(len(m["content"]) for m in block.conversation.messages) <= 1100


ROLES = ("user", "assistant")


def _read_as(entry: dict[str, Any], row: dict[str, Any]) -> FileRecord:
    raw = {"files": "x.jsonl", "generated": {}} | entry
    return FileRecord.of(Fields.of(FileDocuments.model_validate(raw)), row, "here")


THOUGHT = "<think>Hm.</think>\n\nFour."


@pytest.mark.parametrize(
    ("entry", "row", "prompt"),
    [
        ({"messages": "m"}, {"m": '[{"role": "critic", "content": "x"}]'}, None),
        ({"messages": "m"}, {"m": "[1, 2] are what?"}, "[1, 2] are what?"),
        ({"messages": "m"}, {"m": " "}, None),
        ({"messages": "m"}, {"m": None}, None),
        ({"text_field": ["q", "a"], "context_fields": ["q"]}, {"q": None, "a": "x"}, None),
        ({"text_field": ["q", "a"], "context_fields": ["q"]}, {"q": "Q", "a": "x"}, "Q\n"),
        ({"text_field": ["q", "a"], "context_fields": ["q"]}, {"q": "Q"}, "Q\n"),
        ({"text_field": "q"}, {"q": "cut \ud83d"}, "cut ?"),
    ],
)
def test_prompts_of_odd_records(entry: dict[str, Any], row: dict[str, Any], prompt: Any) -> None:
    told = _read_as(entry, row).prompt
    asked_for = told.messages[-1]["content"] if isinstance(told, Conversation) else told
    assert asked_for == prompt


def test_thoughts_are_dropped_from_what_is_asked_and_answered() -> None:
    before = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}]
    row = {"m": [*before, {"role": "user", "content": "Sure?"}]}
    told = _read_as({"messages": "m", "thinking": "drop"}, row).prompt
    assert isinstance(told, Conversation)
    assert told.messages[1]["content"] == "Four."
    entry = FileDocuments.model_validate(
        {"files": "x", "messages": "m", "thinking": "drop", "generated": {}}
    )
    text = Text("here", "train", "", prompt=told)
    prompt = _prompt_of(text, entry, 4096)
    assert prompt is not None
    for said, learnt in ((THOUGHT, "Four."), ("<think>Hm", ""), (" Four. \n", "Four.")):
        answer = GeneratedAnswer("here", prompt.digest, said, True, 3)
        (one,) = with_answers(iter([text]), iter([answer]), entry, 4096, Counter())
        assert one.text == learnt


def test_columns_of_answers_may_be_missing(recipe_of: Made, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?"} for n in range(5)]
    for entry in ({"messages": ["prompt", "completion"]}, {"text_field": "prompt"}):
        fields = Fields.of(
            FileDocuments.model_validate({"files": "x.parquet", "generated": {}} | entry)
        )
        path = tmp_path / "p.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        read = [*read_records(path, kind_of(path), fields)]
        assert len([one for one in read if one.prompt is not None]) == 5
    (tmp_path / "p.txt").write_text("no records", encoding="utf-8")
    plain = FileDocuments.model_validate({"files": "p.txt", "generated": {}})
    with pytest.raises(CorpusError, match="generated asks for prompts, one a record"):
        [*read_records(tmp_path / "p.txt", kind_of(tmp_path / "p.txt"), Fields.of(plain))]


def test_where_padding_is_read_prompts_of_one_length_are_answered_together(models: Path) -> None:
    class Reads(torch.nn.Module):
        """A model that reads what is masked as well, as RWKV does."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self._model, self.generation_config = model, model.generation_config
            self.config, self.name_or_path = model.config, model.name_or_path

        def generate(self, **given: Any) -> Any:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            self._model.generation_config = self.generation_config
            return self._model.generate(**given)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("_model"), name)

    model, encoder = fusellm.load_pretrained("zoo/python", device="cpu")
    wanted = GeneratedSettings(temperature=0, max_new_tokens=4)
    texts = ["def mean(values):", "import", "for item in items:\n    print(", "import"]
    alone = [Writer(model, encoder, None, wanted).write([text], [0])[0].text for text in texts]
    for one in (model, Reads(model)):
        writer = Writer(one, encoder, None, wanted)
        assert writer._may_pad == (one is model)
        assert [answer.text for answer in writer.write(texts, [0])] == alone


def test_adapters_and_rounds_and_studies(recipe_of: Made, tmp_path: Path) -> None:
    file = recipe_of(rounds=2, generated=GREEDY)
    with pytest.raises(RecipeError, match="leaves adapters of one round alone"):
        load_recipe(file, ["training.lora={merge: false}"])
    study = {"name": "s", "recipe": "recipe.yaml", "arms": {"clm": {"train": "clm"}, "fused": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    with pytest.raises(RecipeError, match="an arm trains once"):
        run_study(tmp_path / "study.yaml", tmp_path / "study")
    assert fusellm.Run(file, tmp_path / "run").check()["models"]["target"]
    first, second = rounds_of(
        resolve_paths(
            load_recipe(file, ["corpus.documents.0.generated.seed=4294967295"]), tmp_path
        ),
        tmp_path / "run",
    )
    assert second[0].corpus.generated[0].seed == 0
    assert first[0].corpus.generated[0].seed == 2**32 - 1


# Rounds


def test_a_round_begins_with_what_the_one_before_has_trained(
    recipe_of: Made, models: Path, tmp_path: Path
) -> None:
    file = recipe_of(rounds=3, generated=SAMPLED)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["sources"].append({"model": str(models / "llama"), "name": "itself", "referee": True})
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    recipe = resolve_paths(load_recipe(file), file.parent)
    (first, place), (second, _), (third, _) = rounds_of(recipe, tmp_path / "run")
    assert place == tmp_path / "run" / "round-1"
    assert first.target == recipe.target
    assert first.sources == recipe.sources
    trained = str(tmp_path / "run" / "round-2" / "train" / "fused")
    assert third.target.model == third.sources[1].model == trained
    assert third.sources[0] == recipe.sources[0]
    seeds = [one.corpus.generated[0].seed for one in (first, second, third)]
    assert seeds == [3, 4, 5]
    with pytest.raises(RecipeError, match="each round is a run of its own"):
        Pipeline(recipe, tmp_path / "run", Silent())


def _require_same(whole: Path, cut: Path) -> None:
    """Two runs of two rounds have the same answers, stores and weights."""
    for n in ("round-1", "round-2"):
        for stage in ("generate/0", "corpus", "externalize/chatml", "fuse"):
            one, other = (StageFolder(run / n / stage) for run in (whole, cut))
            assert one.complete
            assert one.fingerprint == other.fingerprint, (n, stage)
        for which in ("fused", "clm"):
            name = f"{n}/train/{which}/model.safetensors"
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_two_rounds_come_to_their_table(recipe_of: Made, tmp_path: Path) -> None:
    """Interrupted on the way: the same answers, stores and weights as at once."""
    file = recipe_of(rounds=2, generated=SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = fusellm.Run(file, whole).execute()
    assert [one.folder.name for one in run.rounds] == ["round-1", "round-2"]
    with pytest.MonkeyPatch.context() as patch:
        _interrupted_after(5, patch)  # in the second round
        with pytest.raises(KeyboardInterrupt):
            fusellm.Run(file, cut).execute()
    answers = [[*read_answers(whole / f"round-{n}", 0)] for n in (1, 2)]
    assert answers[0] != answers[1]
    shown = invoke("run", str(cut))  # goes on by its folder alone
    assert shown.exit_code == 0, shown.output
    assert "Over the rounds" in shown.stdout
    _require_same(whole, cut)
    told = invoke("status", str(cut))
    assert "round-1" in told.stdout
    assert "round-2" in told.stdout
    for command in (
        ["status", "--json"],
        ["clean", "--all", "-y"],
        ["report"],
        ["inspect", "--block", "0"],
    ):
        told = invoke(command[0], str(cut), *command[1:])
        assert told.exit_code != 0
        assert "round-1" in str(told.exception)
    assert run.results.of("fused").value > 0
    later = fusellm.FusedDataset(run.rounds[1])
    assert len(later)
    assert later.encoder.tokenizer.name_or_path.startswith(str(whole))
    moved = tmp_path / "moved"
    cut.rename(moved)
    (tmp_path / "link").symlink_to(moved)
    told = invoke("evaluate", str(tmp_path / "link" / "round-2"))
    assert told.exit_code == 0, told.exception
    text = (moved / "round-2" / "recipe.yaml").read_text(encoding="utf-8")
    assert "../round-1/train/fused" in text
    told = invoke("evaluate", str(moved / "round-2"))  # it finds what the first has trained
    assert told.exit_code == 0, told.exception
    cut = moved
    assert run.model()[0].name_or_path == str(whole / "round-2" / "train" / "fused")
    once = invoke("run", str(recipe_of(generated=SAMPLED)), "--out", str(cut))
    assert "each a run of its own" in str(once.exception)


@pytest.mark.faults
def test_two_rounds_survive_being_killed(recipe_of: Made, tmp_path: Path) -> None:
    """SIGKILL, again and again, wherever it is."""
    file = recipe_of(rounds=2, generated=SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "fusellm", "run", str(file), "--out"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "timed")], check=True, capture_output=True)
    took = time.monotonic() - began
    shutil.rmtree(tmp_path / "timed")
    for share in (0.3, 0.45, 0.6, 0.75):
        process = subprocess.Popen(
            [*command, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(share * took)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run([*command, str(cut)], check=True, capture_output=True)
    _require_same(whole, cut)


# A study


def test_fusechats_way_stands_beside_one_fusion(models: Path, tmp_path: Path) -> None:
    """Each source alone, merged; both at once; and the source's own answers as the text."""
    write_records(tmp_path / "chat.jsonl", records(40))
    raw = {
        "name": "chat",
        "target": str(models / "llama"),
        "sources": [
            {"model": str(models / "chatml"), "name": "one"},
            {"model": str(models / "gemma"), "name": "other"},
        ],
        "corpus": {
            "documents": [{"files": "chat.jsonl", "messages": "messages", "domain": "chat"}],
            "validation_share": 0.15,
            "held_out_share": 0.2,
        },
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "validations": 1,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    study = {
        "name": "fusechat",
        "recipe": "recipe.yaml",
        "seeds": [0],
        "arms": {
            "clm": {"train": "clm"},
            "fused": {},
            "only-one": {"sources": ["one"]},
            "only-other": {"sources": ["other"]},
            "fusechat": {"merge": {"of": ["only-one", "only-other"], "method": "sce"}},
            "answers": {"set": {"corpus.documents.0.generated": SAMPLED | {"by": "one"}}},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    out = tmp_path / "study"
    results = run_study(tmp_path / "study.yaml", out)
    assert [*results.arms] == [*study["arms"]]
    own = out / "arms" / "answers" / "seed-0"
    answers = {one.text for one in read_answers(own, 0)}
    blocks = read_part(open_corpus(own), "train")
    assert {block.text for block in blocks} == {text.strip() for text in answers}
    merged = out / "arms" / "fusechat" / "seed-0" / "merged"
    model, encoder = fusellm.load_pretrained(merged, device="cpu")
    ids = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    written = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape[1] > ids.shape[1]
    page = (out / "study.md").read_text(encoding="utf-8")
    assert "fusechat" in page
    before = page
    assert run_study(tmp_path / "study.yaml", out) == results  # nothing is made anew
    assert (out / "study.md").read_text(encoding="utf-8") == before
