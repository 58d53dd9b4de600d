"""What models write behind held-out beginnings: chosen, kept, gone on with, and shown safely."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from chats import asked
from fusellm.evaluation.text.continuations import NEW_TOKENS, chosen_starts
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.stages.report.write import write_report
from fusellm.store.blocks import Block
from fusellm.store.continuations import continuations_of
from fusellm.store.run_folder import CONTINUATIONS
from fusellm.tokens.conversation import Conversation
from test_report import HOSTILE, make_run, read_page

pytestmark = pytest.mark.usefixtures("unrehearsed")
ALL = ["first", "second", "target", "clm", "fused"]


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, Silent())


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)
        pipeline(world, run).execute()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the models that are loaded to be evaluated."""
    from fusellm.stages import evaluate

    places, load = list[str](), evaluate.load_model

    def counted(located: Any, *rest: Any) -> PreTrainedModel:
        places.append(Path(located.place).name)
        return load(located, *rest)

    monkeypatch.setattr(evaluate, "load_model", counted)
    return places


def told(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / CONTINUATIONS).read_text(encoding="utf-8"))
    return body


def test_every_model_goes_on_with_the_same_beginnings(finished: Path) -> None:
    body = told(finished)
    assert list(body["models"]) == ALL
    domains = [one["domain"] for one in body["beginnings"]]
    assert sorted(domains) == ["code", "code", "prose", "prose"]
    for one in body["beginnings"]:
        assert one["shown"] == one["shown"].rstrip()
        assert one["truth"].strip()
    models = body["models"]
    assert models["first"] == models["target"]  # which are one model
    for name in ALL:
        assert len(models[name]["texts"]) == 4
        assert all(one["missing"] is None for one in models[name]["texts"])
    assert any(one["text"] for name in ALL for one in models[name]["texts"])
    _, page = read_page(finished)
    assert page.headings()[:2] == ["results", "samples"]
    titles = [value for tag, value in page.elements if tag == "h4"]
    assert len(titles) == 4 * (1 + len(ALL))


def test_what_is_written_is_the_likeliest_text(world: Path, finished: Path) -> None:
    """As transformers writes it, of which ours differs by no token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    body = told(finished)
    model = AutoModelForCausalLM.from_pretrained(world / "neox")
    tokenizer = AutoTokenizer.from_pretrained(world / "neox")
    padding = {"pad_token_id": tokenizer.eos_token_id}
    rows = range(len(tokenizer), model.config.vocab_size)
    for beginning, one in zip(body["beginnings"], body["models"]["second"]["texts"], strict=True):
        ids = tokenizer(beginning["shown"], return_tensors="pt").input_ids
        new = model.generate(
            ids, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=[*rows], **padding
        )
        text = tokenizer.decode(new[0, ids.shape[1] :], clean_up_tokenization_spaces=False)
        assert text.replace("<|endoftext|>", "").startswith(one["text"])
        assert one["text"] or "\ufffd" in text[:1] or one["ends"]


def test_no_model_is_asked_twice(world: Path, run: Path, loaded: list[str]) -> None:
    before = (run / CONTINUATIONS).read_bytes()
    pipeline(world, run).execute()
    assert loaded == []
    body = told(run)
    del body["models"]["second"]
    (run / CONTINUATIONS).write_text(json.dumps(body))
    pipeline(world, run).execute(["evaluate"])
    assert loaded == ["neox"]
    assert (run / CONTINUATIONS).read_bytes() == before  # in the order of the table


def test_models_are_loaded_once_for_both(world: Path, run: Path, loaded: list[str]) -> None:
    shutil.rmtree(run / "evaluate")
    (run / CONTINUATIONS).unlink()
    pipeline(world, run).execute(["evaluate"])
    assert loaded == ["llama", "neox", "clm", "fused"]
    assert list(told(run)["models"]) == ALL


def test_another_number_measures_nothing_anew(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusellm.stages.evaluate.measured_nats", None)  # is not called
    manifest = (run / "evaluate/manifest.json").read_bytes()
    pipeline(world, run, "evaluation.continuations=6").execute()
    known = continuations_of(run)
    assert known is not None
    assert len(known.beginnings) == 6
    assert list(known.models) == ALL
    pipeline(world, run, "evaluation.continuations=0").execute()
    assert not (run / CONTINUATIONS).exists()
    assert "samples" not in read_page(run)[1].headings()
    assert (run / "evaluate/manifest.json").read_bytes() == manifest


def test_a_model_that_cannot_write_is_told_in_its_cell(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"no cache in /home/somebody/{HOSTILE}")

    from transformers import GPTNeoXForCausalLM

    monkeypatch.setattr(GPTNeoXForCausalLM, "generate", broken)
    (run / CONTINUATIONS).unlink()
    pipeline(world, run).execute(["evaluate", "report"])
    texts = told(run)["models"]["second"]["texts"]
    assert {one["missing"] for one in texts} == {"this model could not write (NotImplementedError)"}
    assert told(run)["models"]["first"]["texts"][0]["missing"] is None
    html, page = read_page(run)
    assert page.words.count("this model could not write") == 4
    assert "/home/somebody" not in html


@pytest.mark.parametrize("damage", ["{", '{"made_from": 3}', "texts"])
def test_a_damaged_file_is_made_anew(world: Path, run: Path, damage: str) -> None:
    before = (run / CONTINUATIONS).read_bytes()
    if damage == "texts":
        body = told(run)
        body["models"]["first"]["texts"].pop()
        damage = json.dumps(body)
    (run / CONTINUATIONS).write_text(damage)
    write_report(run)
    assert "samples" not in read_page(run)[1].headings()
    pipeline(world, run).execute(["evaluate"])
    assert (run / CONTINUATIONS).read_bytes() == before


# Which texts


def block(n: int, text: str, domain: str = "prose", **more: Any) -> Block:
    return Block(n, f"document {n}", domain, True, text, **more)


def test_beginnings_are_chosen_by_the_seed_and_spread_over_domains() -> None:
    blocks = [block(n, f"{n} words and words go on and on until an end") for n in range(20)]
    blocks += [block(n, f"{n} = f(x) + g(y) # and so on to the end", "code") for n in range(20, 23)]
    chosen = chosen_starts(blocks, 8, 0)
    assert [one.beginning.domain for one in chosen[:6]] == ["prose", "code"] * 3
    assert [one.beginning.domain for one in chosen[6:]] == ["prose"] * 2
    assert chosen_starts(blocks, 4, 0) == chosen[:4]
    assert chosen_starts(blocks, 8, 1) != chosen
    assert len(chosen_starts(blocks, 64, 0)) == 23
    for start in chosen:
        beginning = start.beginning
        whole = next(b.text for b in blocks if b.text.startswith(beginning.shown))
        assert whole == beginning.shown + beginning.truth
        assert beginning.truth[0].isspace()


def test_texts_that_cannot_be_gone_on_with_are_not_chosen() -> None:
    assert (
        chosen_starts([block(0, ""), block(1, "a"), block(2, " \n \n"), block(3, "ab \n")], 4, 0)
        == []
    )


def test_a_document_is_begun_once_and_without_spaces_by_characters() -> None:
    blocks = [Block(n, "one", "prose", n == 1, "数字" * 200) for n in range(2)]
    [start] = chosen_starts(blocks, 4, 0)
    assert start.asked == "数字" * 100


def test_the_context_of_a_text_is_its_beginning() -> None:
    prompt = "Wie heißt die Hauptstadt?\n"
    one = block(0, f"{prompt}Bern.", context=((0, len(prompt.encode())),))
    [start] = chosen_starts([one], 1, 0)
    assert (start.asked, start.beginning.truth) == (prompt, "Bern.")


def test_of_a_conversation_its_first_turn_is_answered() -> None:
    said = asked("How many?", "Four.", "And then?", "Five.")
    system = {"role": "system", "content": "Be brief."}
    told_before = Conversation((system, *said.messages), (2, 4))
    alone, led = chosen_starts(
        [block(0, said.text, conversation=said), block(1, "", "led", conversation=told_before)],
        2,
        0,
    )
    assert alone.asked == Conversation(said.messages[:1], ())
    assert (alone.beginning.shown, alone.beginning.truth) == ("How many?", "Four.")
    assert led.asked == Conversation((system, *said.messages[:1]), ())
    assert led.beginning.shown == "system: Be brief.\n\nuser: How many?"


# The page


def test_hostile_text_is_data_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sources=6)
    text = f"{HOSTILE}\x1b[2J\u202e</p>\n\tsecond line" + " and more" * 200
    models = [f"source-{n}" for n in range(6)] + ["target", "clm", "fused"]
    one = {"text": text, "ends": False, "missing": None}
    empty = {"text": "", "ends": True, "missing": None}
    body = {
        "made_from": "x",
        "beginnings": [{"domain": HOSTILE, "shown": text, "truth": text}],
        "models": {name: {"made_from": name, "texts": [one]} for name in models},
    }
    body["models"]["clm"]["texts"] = [empty]
    (run / CONTINUATIONS).write_text(json.dumps(body), encoding="utf-8")
    write_report(run)
    html, page = read_page(run)
    assert page.open == []
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert page.words.count(f"{HOSTILE}\\x1b[2J\\u202e</p>\n\tsecond line") == 1 + 1 + 8
    assert page.words.count("it ends here") == 1
    assert len(page.words.split("</p>\n\tsecond line")[1].split("…")[0]) < 700
    section = page.words.split("What the models write")[1]
    order = ["the document itself", "target before", "source-0", "source-5", "CLM", "fused"]
    places = [section.index(title) for title in order]
    assert places == sorted(places)
