"""The suites on lm_eval: oracles, files of every layout, and a tiny model against lm_eval's own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm.config import EvaluationSettings, ModelSettings
from fusellm.errors import EvaluationError, IdentityError
from fusellm.evaluation.code.completions import complete
from fusellm.evaluation.harness import lm_eval as around
from fusellm.evaluation.harness import run as harness_run
from fusellm.evaluation.harness.lm_eval import SEED
from fusellm.evaluation.harness.model import LoadedModel, Ruler
from fusellm.evaluation.harness.run import HarnessTask
from fusellm.evaluation.measure import (
    Candidate,
    candidate,
    find_records,
    measure,
    prepare,
    record_path,
)
from fusellm.evaluation.suites import paper_tasks, parse, row_formats, smoke
from fusellm.evaluation.suites.catalogue import BBH_SIZES, SUITES, unknown
from fusellm.evaluation.suites.data import Hub, Origin, of_task, read_rows, read_text
from fusellm.evaluation.suites.lm_eval_tasks import lm_eval_tasks
from fusellm.evaluation.suites.load import make_task, plans_of, read_task, tasks_of
from fusellm.evaluation.suites.paper_tasks import SCIBENCH_BOOKS
from fusellm.evaluation.suites.task import Definition, Inputs, Plan
from fusellm.models.load import locate
from fusellm.progress import Silent
from worlds import SHARED

EVAL = SHARED / "eval"
needs_eval = pytest.mark.skipif(not EVAL.is_dir(), reason="../shared/eval is not there")
FACTS = {"name": "tiny", "weights": "w", "tokenizer": "t", "precision": "float32"}


class Oracle(LM):
    """Answers from the document: rightly, or never rightly."""

    def __init__(self, task: HarnessTask, right: bool) -> None:
        super().__init__()
        self.task, self.right = task, right

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            gold = self.task.task.doc_to_target(request.doc)
            wanted = not isinstance(gold, int) or request.idx == gold
            found.append((0.0, True) if wanted == self.right else (-500.0, False))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [self.speak(request.doc, request.args[1]["until"]) for request in requests]

    def speak(self, doc: dict[str, Any], until: list[str]) -> str:
        if not self.right:
            return " nothing of that kind"
        said = {"bbh": "Well. So the answer is {}.", "bbh_harness": "So the answer is {}."}
        target = doc["answers"][0][0] if "answers" in doc else self.task.task.doc_to_target(doc)
        target = target[0] if isinstance(target, list) else target
        text = " " + said.get(self.task.header.suite, "{}").format(target)
        return text[: min((i for stop in until if (i := text.find(stop)) >= 0), default=None)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise AssertionError("no suite asks for it")


def share_right(task: HarnessTask, right: bool) -> float:
    """Mean score of an oracle; of BLEU, whether the responses are the references."""
    found = task.answers(Oracle(task, right))
    assert found
    if task.header.kind == "bleu":
        return sum(a.response == a.reference for a in found) / len(found)
    return sum(answer.score for answer in found) / len(found)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list("ABCD"[: len(texts)])}


ARC = [
    {"id": "1", "question": "What is wet?", "choices": choices("fire", "water"), "answerKey": "B"},
    {"id": "2", "question": "{{1}}?", "choices": choices("yes", "no", "so"), "answerKey": "A"},
]
OPENBOOK = [{"question_stem": r["question"], **r} for r in ARC]
BOOLQ = [
    {"question": "is the sea salty", "passage": "It is salty.", "answer": True},
    {"question": "is ice warm", "passage": "It is cold.", "answer": False},
]
HELLASWAG = [
    {
        "ind": n,
        "activity_label": "Baking",
        "ctx_a": "A cook takes flour.",
        "ctx_b": "she",
        "ctx": "A cook takes flour. she",
        "endings": ["adds water.", "flies off.", "[title] sings.", "is a stone."],
        "label": str(n),
        "source_id": "",
        "split": "val",
        "split_type": "indomain",
    }
    for n in range(2)
]
TRIVIA = [
    {"question": "Who wrote it?", "question_id": "q", "answer": {"aliases": ["Ann", "Ann Lee"]}},
    {"question": "Where?", "question_id": "r", "answer": {"aliases": ["Rome"]}},
]
NO_DATE = {"day": "", "month": "", "year": ""}


def drop_answer(number: str = "", spans: Sequence[str] = ()) -> dict[str, Any]:
    return {"number": number, "date": NO_DATE, "spans": list(spans)}


DROP = [
    {
        "section_id": "s",
        "query_id": "1",
        "passage": "They had 3 goals.",
        "question": "How many?",
        "answer": drop_answer("3"),
        "validated_answers": {"number": ["", "3"], "date": [NO_DATE] * 2, "spans": [["Goal"], []]},
    },
    {
        "section_id": "s",
        "query_id": "2",
        "passage": "Bob ran.",
        "question": "Who?",
        "answer": drop_answer(spans=["Bob"]),
        "validated_answers": {"number": [], "date": [], "spans": []},
    },
]
UCI_DROP = [
    {k: row[k] for k in ("section_id", "query_id", "passage", "question")}
    | {"answers_spans": {"spans": spans, "types": ["span"] * len(spans)}}
    for row, spans in zip(DROP, (["3", "Goal", "3"], ["Bob"]), strict=True)
]
LAMBADA = [{"text": "He opened the old door"}, {"text": "She closed the new window"}]
GERMAN = [
    {"translation": {"en": "Good day.", "de": "Guten Tag."}},
    {"translation": {"en": "Thank you.", "de": "Danke, sehr."}},
]


def problem(answer: str, unit: str = "$10^3$ m ") -> dict[str, str]:
    return {"problem_text": "How far? ", "answer_number": answer, "unit": unit, "source": "x"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made rows of every benchmark, as its hub repository or its source has them."""
    root = tmp_path_factory.mktemp("data")
    write_parquet(root / "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet", ARC)
    write_lines(root / "ai2_arc/ARC-Challenge/test.jsonl", ARC)
    write_parquet(root / "google/boolq/data/validation-00000-of-00001.parquet", BOOLQ)
    write_lines(root / "hellaswag_val.jsonl", HELLASWAG)
    write_parquet(root / "openbookqa/main/test-00000-of-00002.parquet", OPENBOOK[:1])
    write_parquet(root / "openbookqa/main/test-00001-of-00002.parquet", OPENBOOK[1:])
    write_parquet(root / "trivia_qa/rc.nocontext/validation-00000-of-00001.parquet", TRIVIA)
    (root / "drop.json").write_text(json.dumps(DROP), encoding="utf-8")
    write_lines(root / "lambada_openai.jsonl", LAMBADA)
    for split in ("validation", "test"):
        write_lines(root / f"iwslt2017-en-de.{split}.jsonl", GERMAN)
    for book in SCIBENCH_BOOKS:
        path = root / f"scibench/dataset/original/{book}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([problem(" -1.95 "), problem("40.", " ")]), encoding="utf-8")
    for name in BBH_SIZES:
        path = root / f"bbh/{name}.json"
        path.parent.mkdir(exist_ok=True)
        rows = [
            {"input": f"{name} {{{{x}}}}?", "target": t} for t in ("(A)", "True", "Valid", "12")
        ]
        path.write_text(json.dumps({"canary": "none", "examples": rows}), encoding="utf-8")
        prompt = root / f"cot-prompts/{name}.txt"
        prompt.parent.mkdir(exist_ok=True)
        prompt.write_text(
            "canary\n-----\nDo it.\n\nQ: one?\nA: Let's think step by step.\nIt is 1. "
            "So the answer is 1.\n",
            encoding="utf-8",
        )
    return root


SUITES_WITH_TASKS = [(suite.name, plan) for suite in SUITES.values() for plan in suite.plans]


@pytest.mark.parametrize(
    ("suite", "plan"),
    [(s, p) for s, p in SUITES_WITH_TASKS if not s.startswith("bbh") or p.name[0] in "bs"],
    ids=lambda found: found if isinstance(found, str) else found.name,
)
def test_an_oracle_scores_1_and_its_opposite_0(suite: str, plan: Plan, data: Path) -> None:
    settings = EvaluationSettings(data_dir=str(data))
    task = read_task(suite, plan, settings)
    assert share_right(task, True) == 1
    assert share_right(task, False) == 0
    assert task.header.data
    assert all(len(digest) == 64 for digest in task.header.data.values())


def test_the_table_of_suites() -> None:
    assert list(SUITES) == [
        *("smoke", "lm", "bbh", "bbh_harness", "commonsense", "textgen", "multiple", "humaneval")
    ]
    assert SUITES["multiple"].documents == 1596
    assert SUITES["bbh"].documents == SUITES["bbh_harness"].documents == 6511
    assert SUITES["commonsense"].documents == 2376 + 1172 + 3270 + 10042 + 500
    for suite in SUITES.values():
        assert len(suite.tasks) == len(suite.plans) + len(suite.others)
        assert suite.about
        assert suite.contains
    with pytest.raises(EvaluationError, match="lm is not run on lm_eval"):
        plans_of(SUITES["lm"], EvaluationSettings())


@needs_eval
def test_bbh_loads_in_full_and_is_answered_by_its_own_targets() -> None:
    """Every question by the pure scorer; one task of each protocol through lm_eval."""
    total = 0
    for plan in SUITES["bbh"].plans:
        rows, _ = read_rows(plan.rows["questions"], EVAL)
        assert len(rows) == plan.documents
        total += len(rows)
        for row in rows:
            read = parse.bbh_answer(f"Yes. So the answer is {row['target']}.")
            assert parse.same_but_for_case_and_punctuation(read, row["target"])
            assert parse.bbh_plain_answer(f"So the answer is {row['target']}") == row["target"]
        text, _ = read_text(plan.texts["prompt"], EVAL)
        asked = paper_tasks.bbh(Inputs({"questions": rows}, {"prompt": text})).rows[-1]["prompt"]
        assert asked.endswith(f"\n\nQ: {rows[-1]['input']}\nA:")
        assert asked.count("So the answer is ") == 3
        assert asked.removesuffix(f"\n\nQ: {rows[-1]['input']}\nA:") in text
        assert "canary" not in asked.lower()
    assert total == 6511
    for suite, short in (("bbh", 0), ("bbh_harness", 7)):
        settings = EvaluationSettings(data_dir=str(EVAL), tasks=["reasoning_about_colored_objects"])
        (task,) = tasks_of(suite, settings)
        found = task.answers(Oracle(task, True))
        assert len(found) == 250
        assert sum(answer.score for answer in found) == 250 - short


@needs_eval
@pytest.mark.slow
@pytest.mark.parametrize(("suite", "short"), [("bbh", 0), ("bbh_harness", 7)])
def test_all_of_bbh_through_an_oracle(suite: str, short: int) -> None:
    settings = EvaluationSettings(data_dir=str(EVAL))
    means, right, documents = [], 0.0, 0
    for task in tasks_of(suite, settings):
        found = task.answers(Oracle(task, True))
        assert len({answer.document for answer in found}) == len(found)
        means.append(sum(answer.score for answer in found) / len(found))
        right += sum(answer.score for answer in found)
        documents += len(found)
    assert (len(means), documents) == (27, 6511)
    assert right == 6511 - short
    if suite == "bbh":
        assert 100 * sum(means) / len(means) == 100.0


@needs_eval
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "boolq", "openbookqa"])
def test_commonsense_records_load_in_full(name: str) -> None:
    settings = EvaluationSettings(data_dir=str(EVAL), tasks=[name])
    (task,) = tasks_of("commonsense", settings)
    (plan,) = plans_of(SUITES["commonsense"], settings)
    documents = list(task.task.eval_docs)
    assert len(documents) == plan.documents
    limited = settings.model_copy(update={"limit": 40})
    assert share_right(replace(task, settings=limited), True) == 1
    notes = task.header.protocol["notes"]
    assert (name == "boolq") == any("passage" in note for note in notes)
    if name != "boolq":
        records = json.loads(find_record(name).read_text(encoding="utf-8"))
        assert [spelled(doc) for doc in documents] == [r["instruction"] for r in records]
        right = [
            f"answer{doc['choices']['label'].index(doc['answerKey']) + 1}" for doc in documents
        ]
        assert right == [record["answer"] for record in records]


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [("arc_easy", "ARC-Easy", ARC), ("openbookqa", "openbookqa", OPENBOOK)],
)
def test_a_record_asks_what_the_hubs_row_asks(
    name: str, file: str, rows: Any, data: Path, tmp_path: Path
) -> None:
    """Instructions show the choices; lm_eval's prompts do not: each is a continuation to score."""
    records = [
        {
            "instruction": spelled(row),
            "answer": f"answer{row['choices']['label'].index(row['answerKey']) + 1}",
        }
        for row in rows
    ]
    folder = tmp_path / "commonsense"
    folder.mkdir()
    (folder / f"{file}.test.json").write_text(json.dumps(records), encoding="utf-8")
    asked, right = [], []
    for place in (data, tmp_path):
        settings = EvaluationSettings(data_dir=str(place), tasks=[name])
        (task,) = tasks_of("commonsense", settings)
        asked.append([request.args for request in task.requests()])
        right.append([task.task.doc_to_target(document) for document in task.task.eval_docs])
    assert asked[0] == asked[1]
    assert right[0] == right[1] == [1, 0]
    assert asked[0][0][1] == " fire"
    assert not any("Answer1" in prompt for prompt, _ in asked[0])


def find_record(name: str) -> Path:
    stem = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}.get(name, name)
    return EVAL / "commonsense" / f"{stem}.test.json"


def spelled(doc: dict[str, Any]) -> str:
    """The record that a row must have come from."""
    texts = doc["choices"]["text"]
    question = doc.get("question", doc.get("question_stem"))
    shown = " ".join(f"Answer{n}: {text}" for n, text in enumerate(texts, 1))
    places = "/".join(f"answer{n}" for n in range(1, len(texts) + 1))
    return (
        f"Please choose the correct answer to the question: {question}\n\n{shown}\n\n"
        f"Answer format: {places}"
    )


_PLAIN = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: text == text.strip() and "Answer" not in text
)


@given(_PLAIN, st.lists(_PLAIN, min_size=2, max_size=5))
def test_choices_are_told_apart_exactly(question: str, texts: list[str]) -> None:
    doc = {"question": question, "choices": {"text": texts}}
    assert row_formats.choices_of(0, spelled(doc)) == (question, texts)


def test_choices_that_cannot_be_told_apart_are_refused() -> None:
    for texts in (["a", "b Answer2: c"], ["a", " b"], ["a", ""]):
        with pytest.raises(EvaluationError, match="record 7 has choices that cannot"):
            row_formats.choices_of(7, spelled({"question": "q", "choices": {"text": texts}}))


def test_drop_rows_of_both_schemas() -> None:
    number, span = row_formats.drop_rows(DROP)
    assert number["answer"]["number"] == "3"
    assert span["answer"]["spans"] == ["Bob"]
    flat, _ = row_formats.drop_rows(UCI_DROP)
    assert flat["answer"]["spans"] == ["3"]
    assert flat["validated_answers"]["spans"] == [["Goal"]]
    as_list = [DROP[1] | {"validated_answers": [drop_answer("7")]}]
    assert row_formats.drop_rows(as_list)[0]["validated_answers"]["number"] == ["7"]


def test_ucinlp_drop_is_scored_and_says_what_it_cannot_tell(tmp_path: Path) -> None:
    write_lines(tmp_path / "drop.jsonl", UCI_DROP)
    settings = EvaluationSettings(data_dir=str(tmp_path), tasks=["drop"])
    (task,) = tasks_of("textgen", settings)
    assert share_right(task, True) == 1
    assert "each span is an answer of its own" in task.header.protocol["notes"][0]


def test_missing_files_are_named_with_their_source(tmp_path: Path, data: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        list(tasks_of("bbh", EvaluationSettings(data_dir=str(tmp_path))))
    assert f"{tmp_path} has no bbh-cot-prompts/boolean_expressions.txt" in str(caught.value)
    assert "suzgunmirac/BIG-Bench-Hard" in str(caught.value)
    with pytest.raises(EvaluationError, match=r"hellaswag.*huggingface.co/datasets/Rowan/hella"):
        list(
            tasks_of("commonsense", EvaluationSettings(data_dir=str(tmp_path), tasks=["hellaswag"]))
        )
    with pytest.raises(EvaluationError, match="no data folder was given"):
        list(tasks_of("textgen", EvaluationSettings()))
    with pytest.raises(EvaluationError, match="there is no data folder"):
        list(tasks_of("textgen", EvaluationSettings(data_dir=str(tmp_path / "none"))))
    with pytest.raises(EvaluationError, match="has no task 'arc'; it has arc_easy"):
        list(tasks_of("commonsense", EvaluationSettings(data_dir=str(data), tasks=["arc"])))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "has no rows"),
        ("{", "cannot be read"),
        ('"text"\n', "has no list of rows"),
        ('{"txt": "a"}\n', "row 0 of lambada_openai.jsonl has the keys txt, and needs text"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "lambada_openai.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError) as caught:
        list(
            tasks_of(
                "textgen", EvaluationSettings(data_dir=str(tmp_path), tasks=["lambada_openai"])
            )
        )
    assert part in str(caught.value)


def test_the_hub_is_asked_only_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = of_task("x", Hub("a/b", None, "test"), (("text",),))
    with pytest.raises(EvaluationError, match="--allow-download"):
        read_rows(origin, None)
    with pytest.raises(EvaluationError, match=r"hub:a/b/test could not be read from the hub"):
        read_rows(origin, None, allow_download=True)
    rows = datasets.Dataset.from_list([{"text": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    read, digests = read_rows(origin, None, allow_download=True)
    assert read == ({"text": "a"},)
    assert list(digests) == ["hub:a/b/test"]


def seed_everything(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    for module in (around, harness_run):
        monkeypatch.setattr(module, "SEED", seed)


def test_a_file_that_changes_changes_what_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvaluationSettings(data_dir=str(tmp_path), tasks=["lambada_openai"])
    headers = []
    for rows in (LAMBADA, LAMBADA, LAMBADA[::-1]):
        write_lines(tmp_path / "lambada_openai.jsonl", rows)
        (task,) = tasks_of("textgen", settings)
        headers.append(task.header)
    assert headers[0] == headers[1]
    assert headers[0].compared_by != headers[2].compared_by
    seed_everything(monkeypatch, 2)
    (other,) = tasks_of("textgen", settings)
    assert other.header.compared_by != headers[2].compared_by


@pytest.mark.slow
def test_tasks_of_lm_eval_are_found_by_name_and_need_the_hub() -> None:
    with pytest.raises(EvaluationError) as caught:
        lm_eval_tasks("arc_eazy", EvaluationSettings())
    assert "did you mean arc_easy" in str(caught.value)
    with pytest.raises(EvaluationError, match="gets its data from the hub"):
        lm_eval_tasks("piqa", EvaluationSettings())
    with pytest.raises(EvaluationError, match="lm_eval could not load humaneval"):
        lm_eval_tasks("humaneval", EvaluationSettings(allow_download=True))


def _yaml_task(folder: Path, name: str, **changes: Any) -> None:
    body = {
        "task": name,
        "tag": "some",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for all of lm_eval's own tasks."""
    write_lines(tmp_path / "rows.jsonl", [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}])
    manager = TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda: manager(include_path=str(tmp_path), include_defaults=False),
    )
    return tmp_path


def mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def test_a_task_of_lm_eval_is_run_by_its_name(theirs: Path, tiny: LoadedModel) -> None:
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, TAKE_FIRST]}
        for name, pattern in (("strict", "^never$"), ("loose", "(.*)"))
    ]
    _yaml_task(theirs, "first", metric_list=[mean("exact_match")], filter_list=filters)
    _yaml_task(theirs, "second", metric_list=[{"metric": "bleu"}, {"metric": "ter"}])
    with pytest.raises(EvaluationError, match=r"first is a task of lm_eval.*--allow-download"):
        list(tasks_of("first", EvaluationSettings()))
    with pytest.raises(EvaluationError, match=r"'frist'.*did you mean first"):
        list(tasks_of("frist", EvaluationSettings()))
    settings = EvaluationSettings(allow_download=True)
    first, second = tasks_of("some", settings)
    assert (first.header.task, first.header.kind, first.filter) == ("first", "binary", "strict")
    record = first.run(tiny, FACTS)
    assert [answer.reason for answer in record.answers] == ["no answer found"] * 2
    assert second.header.kind == "bleu"
    record = second.run(tiny, FACTS)
    assert [answer.reference for answer in record.answers] == ["1", "2"]
    (only,) = tasks_of("some", settings.model_copy(update={"tasks": ["second"]}))
    assert only.header.task == "second"


TAKE_FIRST = {"function": "take_first"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"unsafe_code": True, "metric_list": [mean("exact_match")]}, "with no sandbox"),
        ({"metric_list": [{"metric": "ter"}]}, "no measure that is a mean"),
        ({"metric_list": [{"metric": "no_such_measure"}]}, "could not load odd"),
        ({"test_split": "none"}, "could not load odd"),
    ],
)
def test_tasks_of_lm_eval_that_are_refused(
    theirs: Path, changes: dict[str, Any], part: str
) -> None:
    _yaml_task(theirs, "odd", **changes)
    with pytest.raises(EvaluationError, match=part):
        list(tasks_of("odd", EvaluationSettings(allow_download=True)))


# ----------------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def tiny(world: Path) -> LoadedModel:
    model = AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32)
    return LoadedModel(model.train(), AutoTokenizer.from_pretrained(world / "llama"), 512)


def stock_results(
    folder: Path, loaded: LoadedModel, file: str, rows: Any, changes: Any, chat: bool = False
) -> Any:
    """lm_eval's own results on rows, with nothing of ours between."""
    folder.mkdir()
    write_lines(folder / "rows.jsonl", rows)
    body = {
        "include": str(files("lm_eval") / "tasks" / file),
        "task": "own",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": dict.fromkeys(
                ("train", "validation", "test"), str(folder / "rows.jsonl")
            ),
            "cache_dir": str(folder / "cache"),
        },
        **changes,
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(loaded.model.name_or_path)
    tokenizer.chat_template = loaded.tokenizer.chat_template
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=4),
        tasks=["own"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


@pytest.mark.parametrize(
    ("suite", "name", "rows", "file", "key"),
    [
        ("commonsense", "arc_easy", ARC, "arc/arc_easy.yaml", "acc_norm,none"),
        ("commonsense", "hellaswag", HELLASWAG, "hellaswag/hellaswag.yaml", "acc_norm,none"),
        ("textgen", "drop", DROP, "drop/default.yaml", "f1,none"),
        ("textgen", "lambada_openai", LAMBADA, "lambada/lambada_openai.yaml", "acc,none"),
        (
            "textgen",
            "triviaqa",
            TRIVIA,
            "triviaqa/default.yaml",
            "exact_match,remove_whitespace",
        ),
    ],
)
def test_scores_are_lm_evals_own(
    suite: str,
    name: str,
    rows: Any,
    file: str,
    key: str,
    data: Path,
    tiny: LoadedModel,
    tmp_path: Path,
) -> None:
    settings = EvaluationSettings(data_dir=str(data), batch_size=4, tasks=[name], max_new_tokens=24)
    (task,) = tasks_of(suite, settings)
    record = task.run(tiny, FACTS)
    until = {"drop": ["."], "triviaqa": ["\n", ".", ","]}.get(name)
    writing = {"until": until, "max_gen_toks": 24, "do_sample": False}
    changes = {} if until is None else {"generation_kwargs": writing}
    theirs = stock_results(tmp_path / "stock", tiny, file, rows, changes)
    samples = [s for s in theirs["samples"]["own"] if s["filter"] == key.split(",")[1]]
    metric = key.split(",")[0]
    assert [a.score for a in record.answers] == [s[metric] for s in samples]
    assert [a.prompt for a in record.answers] == [s["prompt_hash"] for s in samples]
    mean = sum(a.score for a in record.answers) / len(record.answers)
    assert mean == theirs["results"]["own"][key]
    if task.task.OUTPUT_TYPE == "generate_until":
        assert [a.response for a in record.answers] == [s["resps"][0][0] for s in samples]
    assert record.header.software["lm_eval"] == lm_eval.__version__


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CHATML = (RECIPES / "templates" / "chatml.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("suite", "name", "rows", "file", "key"),
    [
        ("commonsense", "arc_easy", ARC, "arc/arc_easy.yaml", "acc_norm,none"),
        (
            "textgen",
            "triviaqa",
            TRIVIA,
            "triviaqa/default.yaml",
            "exact_match,remove_whitespace",
        ),
    ],
)
def test_by_a_chat_template_scores_are_lm_evals_own(
    suite: str,
    name: str,
    rows: Any,
    file: str,
    key: str,
    data: Path,
    tiny: LoadedModel,
    tmp_path: Path,
) -> None:
    speaks = AutoTokenizer.from_pretrained(tiny.model.name_or_path)
    speaks.chat_template = CHATML
    loaded = replace(tiny, tokenizer=speaks)
    settings = EvaluationSettings(
        data_dir=str(data), batch_size=4, tasks=[name], max_new_tokens=24, chat=True
    )
    (task,) = tasks_of(suite, settings)
    record = task.run(loaded, FACTS)
    writing = {"until": ["\n", ".", ","], "max_gen_toks": 24, "do_sample": False}
    changes = {"generation_kwargs": writing} if name == "triviaqa" else {}
    theirs = stock_results(tmp_path / "stock", loaded, file, rows, changes, chat=True)
    samples = [s for s in theirs["samples"]["own"] if s["filter"] == key.split(",")[1]]
    assert [a.score for a in record.answers] == [s[key.split(",")[0]] for s in samples]
    assert [a.prompt for a in record.answers] == [s["prompt_hash"] for s in samples]
    render = Ruler(speaks, 512).apply_chat_template
    told = [request.args[0] for request in task.requests(render, "Be brief.")]
    assert all(prompt.startswith("<|im_start|>system\nBe brief.") for prompt in told)
    asked = task.requests(render)
    assert all(request.args[0].endswith("<|im_start|>assistant\n") for request in asked)
    (plain,) = tasks_of(suite, settings.model_copy(update={"chat": False}))
    assert plain.header.compared_by != task.header.compared_by


def test_who_has_no_chat_template_is_named(world: Path) -> None:
    with pytest.raises(EvaluationError, match="llama has no chat template"):
        candidate("llama", locate(ModelSettings(model=str(world / "llama"))), chat=True)
    settings = ModelSettings(
        model=str(world / "llama"), chat_template=str(RECIPES / "templates" / "chatml.jinja")
    )
    one = candidate("llama", locate(settings), chat=True)
    assert one.load().tokenizer.chat_template == CHATML
    dated = settings.model_copy(
        update={"chat_template": "{{ strftime_now('%d %b %Y') }}" + CHATML, "system": "Be brief."}
    )
    other = candidate("llama", locate(dated), chat=True)
    assert other.facts["chat_template"] != one.facts["chat_template"]
    assert other.ruler is not None
    told = other.ruler.apply_chat_template([{"role": "user", "content": "a"}])
    assert told.startswith("26 Jul 2024<|im_start|>user")  # on every day
    assert other.load().system == other.ruler.system == "Be brief."
    with pytest.raises(EvaluationError, match="which are no conversations"):
        prepare(["humaneval"], EvaluationSettings(chat=True), Silent())


def _choosing(count: int) -> Definition:
    words = ["model", "text", "token", "byte", "source", "reader", "mass", "return"]
    rows = tuple(
        {"t": f"{words[n % 8]} {words[n % 5]}", "c": words[n % 4 : n % 4 + 3], "g": n % 3}
        for n in range(count)
    )
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{t}}",
        "doc_to_choice": "c",
        "doc_to_target": "g",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }
    return Definition(rows, config)


def test_nats_of_choices_are_lm_evals_own(tiny: LoadedModel, tmp_path: Path) -> None:
    """Not only which choice wins: the log-likelihoods themselves, through the same interface.

    To float32's rounding: products of other shapes sum in another order on some processors.
    """
    definition = _choosing(30)
    settings = EvaluationSettings(batch_size=4)
    plan = Plan("own", "acc_norm", "binary", 30, lambda _: definition)
    task = make_task("x", plan, definition, {}, settings)
    record = task.run(tiny, FACTS)
    ours = [[r.resps[0] for r in task.task.instances if r.doc_id == n] for n in range(30)]
    write_lines(tmp_path / "rows.jsonl", definition.rows)
    body = definition.config | {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")
    theirs = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=tiny.model,
            tokenizer=AutoTokenizer.from_pretrained(tiny.model.name_or_path),
            batch_size=4,
        ),
        tasks=["own"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = theirs["samples"]["own"]
    for mine, sample in zip(ours, samples, strict=True):
        for (nats, is_greedy), response in zip(mine, sample["resps"], strict=True):
            assert nats == pytest.approx(response[0][0], rel=1e-6)
            assert is_greedy == response[0][1]
    assert [a.score for a in record.answers] == [s["acc_norm"] for s in samples]
    assert [a.others["acc"] for a in record.answers] == [s["acc"] for s in samples]
    assert 0 < sum(a.score for a in record.answers) < 30
    assert len({a.document for a in record.answers}) == 30


def test_the_choice_told_is_the_one_scored(tiny: LoadedModel) -> None:
    definition = _choosing(24)
    plan = Plan("own", "acc_norm", "binary", 24, lambda _: definition)
    settings = EvaluationSettings()
    record = make_task("x", plan, definition, {}, settings).run(tiny, FACTS)
    for row, answer in zip(definition.rows, record.answers, strict=True):
        assert (row["c"][row["g"]] == answer.response) == (answer.score == 1)


def test_a_model_and_its_tokenizer_are_left_as_they_were(tiny: LoadedModel, data: Path) -> None:
    settings = EvaluationSettings(data_dir=str(data), tasks=["lambada_openai"])
    (task,) = tasks_of("textgen", settings)
    before = torch.random.get_rng_state()
    for training in (True, False):
        tiny.model.train(training)
        task.run(tiny, FACTS)
        assert tiny.model.training is training
    assert tiny.tokenizer.pad_token is None
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokenizers_that_spoil_prompts_are_refused(tiny: LoadedModel, data: Path) -> None:
    """One that ends every text would have a model go on after its end."""
    settings = EvaluationSettings(data_dir=str(data), tasks=["lambada_openai"])
    (task,) = tasks_of("textgen", settings)
    ending = deepcopy(tiny.tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", ending.eos_token_id)]
    )
    assert ending("text").input_ids[-1] == ending.eos_token_id
    with pytest.raises(EvaluationError, match="ends every text with </s>"):
        task.run(replace(tiny, tokenizer=ending), FACTS)
    without = deepcopy(tiny.tokenizer)
    without.eos_token = None
    with pytest.raises(EvaluationError, match="no token that ends a text"):
        task.run(replace(tiny, tokenizer=without), FACTS)


def _long(tokens: int) -> Definition:
    rows = tuple({"t": "text " * n} for n in (3, tokens, 4, tokens))
    return Definition(rows, _choosing(1).config | {"doc_to_choice": ["a", "b"], "doc_to_target": 0})


def test_long_prompts_stop_the_task_before_it_begins(tiny: LoadedModel) -> None:
    definition = _long(600)
    plan = Plan("own", "acc", "binary", 4, lambda _: definition)
    settings = EvaluationSettings()
    task = make_task("x", plan, definition, {}, settings)
    with pytest.raises(EvaluationError, match=r"2 documents of x/own .*room for 513"):
        task.run(tiny, FACTS)
    settings = EvaluationSettings(too_long="truncate")
    task = make_task("x", plan, definition, {}, settings)
    record = task.run(tiny, FACTS)
    assert [answer.truncated for answer in record.answers] == [False, True, False, True]
    assert record.header.protocol["too_long"] == "truncate"
    assert len({answer.document for answer in record.answers}) == 4


@pytest.mark.parametrize(("new_tokens", "fits"), [(8, True), (500, False), (509, False)])
def test_room_for_what_is_written_is_kept(tiny: LoadedModel, new_tokens: int, fits: bool) -> None:
    plan = SUITES["smoke"].plans[2]
    definition = plan.define(Inputs({}, {}))
    definition.config["generation_kwargs"]["max_gen_toks"] = new_tokens
    settings = EvaluationSettings(limit=1)
    task = make_task("smoke", plan, definition, {}, settings)
    if fits:
        assert len(task.run(tiny, FACTS).answers) == 1
    else:
        with pytest.raises(EvaluationError, match="1 documents of smoke/recall"):
            task.run(tiny, FACTS)


def test_the_limit_of_what_is_written_is_part_of_the_protocol(
    tiny: LoadedModel, data: Path
) -> None:
    only = ["word_sorting"]
    settings = EvaluationSettings(data_dir=str(data), tasks=only)
    (task,) = tasks_of("bbh", settings)
    with pytest.raises(EvaluationError, match=r"write 512 tokens, and this one reads 512.*lower"):
        task.run(tiny, FACTS)
    limited = EvaluationSettings(data_dir=str(data), tasks=only, max_new_tokens=16)
    (short,) = tasks_of("bbh", limited)
    record = short.run(tiny, FACTS)
    assert record.header.protocol["writing"]["max_gen_toks"] == 16
    assert record.header.compared_by != task.header.compared_by
    assert all(answer.reason == "no 'So the answer is'" for answer in record.answers)


def test_a_suite_is_run_once_and_its_model_loaded_only_if_needed(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    loads = []
    shown = Shown()

    def load() -> LoadedModel:
        loads.append(1)
        return tiny

    def run(**changes: Any) -> list[Any]:
        settings = EvaluationSettings(limit=3, **changes)
        models = [Candidate(FACTS | {"name": "a/b"}, load)]
        prepared = prepare(["smoke"], settings, shown)
        known, _ = find_records(models, prepared, tmp_path, redo=bool(changes))
        return measure(models, prepared, tmp_path, shown, known)["a/b"]

    first = run()
    assert [record.header.task for record in first] == ["patterns", "agreement", "recall"]
    assert all(len(record.answers) == 3 for record in first)
    assert sorted(p.name for p in (tmp_path / "smoke" / "a--b").iterdir()) == [
        "agreement.jsonl",
        "patterns.jsonl",
        "recall.jsonl",
    ]
    assert shown.done == {"smoke/patterns": 12, "smoke/agreement": 6, "smoke/recall": 3}
    assert run() == first
    assert len(loads) == 1
    with pytest.raises(IdentityError, match=r"patterns.jsonl .* batch_size was .* So were 2 more"):
        find_records(
            [Candidate(FACTS | {"name": "a/b"}, load)],
            prepare(["smoke"], EvaluationSettings(batch_size=2), shown),
            tmp_path,
        )
    assert run(batch_size=2)[0].header.identity != first[0].header.identity
    assert len(loads) == 2


class Shown(Silent):
    """Counts what bars are advanced by."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}

    def start(self, what: str, total: float, unit: str) -> Any:
        done = self.done

        class Bar:
            def __enter__(self) -> "Bar":
                done[what] = 0
                return self

            def __exit__(self, *_: object) -> None:
                assert done[what] == total

            def advance(self, amount: float = 1, note: str = "") -> None:
                done[what] += amount

            def resize(self, total: float) -> None:
                pass

        return Bar()


def test_lm_eval_is_named_where_it_is_missing(
    data: Path, monkeypatch: pytest.MonkeyPatch, tiny: LoadedModel
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for suite in ("smoke", "piqa"):
        with pytest.raises(EvaluationError, match=r"pip install 'fusellm\[eval\]'"):
            list(tasks_of(suite, EvaluationSettings()))
    with pytest.raises(EvaluationError, match=r"pip install 'fusellm\[eval\]'"):
        complete(tiny, ["a"], [], EvaluationSettings(max_new_tokens=4))


def test_nothing_of_the_extra_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, fusellm.evaluation.suites.load, fusellm.evaluation.code.completions\n"
        "print({'lm_eval', 'sacrebleu', 'evaluate', 'nltk', 'rouge_score'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_code_that_moves_makes_no_other_protocol() -> None:
    """A protocol's digest has names of functions, and none of modules."""
    named = [harness_run._plain(one) for one in (paper_tasks.bbh_scores, smoke._recalled)]
    assert named == ["fusellm.bbh_scores", "fusellm._recalled"]


def test_names_of_models_stay_in_their_folder() -> None:
    for name in ("../../x", "..", "/x", "a b", "x/../y"):
        path = record_path(Path("out"), "smoke", name, "task")
        assert path.parts[:2] == ("out", "smoke")
        assert len(path.parts) == 4
        assert path.parts[2] not in (".", "..")


def test_programs_are_completed_in_order(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["return value", "class model def import print", "text"]
    greedy = EvaluationSettings(max_new_tokens=12)
    whole = complete(tiny, prompts, [], greedy.model_copy(update={"batch_size": 1}))
    assert [len(written.texts) for written in whole] == [1, 1, 1]
    assert whole == complete(tiny, prompts[:1], [], greedy) + [
        complete(tiny, [prompt], [], greedy)[0] for prompt in prompts[1:]
    ]
    text = whole[1].texts[0]
    stop = text[len(text) // 2 :][:3]
    assert stop
    (cut,) = complete(tiny, prompts[1:2], [stop], greedy)[0].texts
    assert cut == text[: text.index(stop)]
    sampled = EvaluationSettings(max_new_tokens=12, samples=3, temperature=0.8, top_p=0.95)
    seed_everything(monkeypatch, 3)
    found = complete(tiny, prompts, [], sampled)
    assert found == complete(tiny, prompts, [], sampled)
    seed_everything(monkeypatch, 4)
    assert found != complete(tiny, prompts, [], sampled)
    assert len(set(found[0].texts)) > 1
    with pytest.raises(ValueError, match="samples: 3 at temperature 0 are all equal"):
        EvaluationSettings(samples=3)


# ----------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("response", "answer", "plain"),
    [
        (" It is so. So the answer is (Q).", "(Q)", "(Q)"),
        ("So the answer is True", "So the answer is True", "True"),
        ("So the answer is (A).\n\nQ: x\nA: So the answer is (B).", "(A)", "(A)"),
        ("So the answer is a b c\n\nQ: next", "So the answer is a b c", "a b c"),
        (" True\n\nQ: next", "True", "True"),
        ("  ", "", ""),
        ("So the answer is ] ) >. More.", "] ) >", "] ) >"),
        ("So the answer is 2.5 m.", "2", "2.5 m"),
        ("the answer is 7.", "the answer is 7.", "the answer is 7."),
    ],
)
def test_answers_of_bbh(response: str, answer: str, plain: str) -> None:
    assert parse.bbh_answer(response) == answer
    assert parse.bbh_plain_answer(response) == plain


@given(st.text(st.characters(codec="ascii", exclude_characters=".\n")))
def test_an_answer_is_read_back(target: str) -> None:
    assert parse.bbh_answer(f"x. So the answer is {target}. y") == target.strip()


def test_matching_of_bbh_and_its_blind_spots() -> None:
    same, strict = parse.same_but_for_case_and_punctuation, parse.same_but_for_case_and_space
    assert same("(a)", "A")
    assert not same("true", "false")
    for wrong, target in (("> > >", "] ) >"), ("-5", "5")):
        assert same(wrong, target)
        assert not strict(wrong, target)
    assert strict("Ant  bee", "ant bee")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 40.", 40),
        ("the answer is -131.1 kJ, or 131", -131.1),
        ("so 3 and 4 make 7", 7),
        (r"\boxed{1.5 \times 10^{3}} m, not 9", 1500),
        (r"The answer is \boxed{\frac{1}{4}}", 0.25),
        (r"the answer is $1.602 \times 10^{-19}$ C", 1.602e-19),
        ("answer is 6.02e23", 6.02e23),
        ("answer is 6.02 x 10^23 per mole", 6.02e23),
        ("answer is 1,234,567.5 J", 1234567.5),
        ("answer is 3/4", 0.75),
        ("answer is −2.5", -2.5),
        ("from 10-20 m", 20),
        ("water is H2O and N_2", None),
        ("answer is 10^{6}", 1e6),
        ("answer is .5", 0.5),
        ("the answer is unclear, maybe 5", 5),
        ("answer is 5 / 0", float("nan")),
        ("", None),
        ("nothing", None),
    ],
)
def test_numbers_of_scibench(text: str, number: float | None) -> None:
    found = parse.scibench_number(text)
    assert found == pytest.approx(number, nan_ok=True) if number is not None else found is None


@given(st.floats(-1e12, 1e12).filter(lambda x: x == 0 or abs(x) > 1e-6))
def test_a_number_is_read_back(number: float) -> None:
    for spelled_ in (repr(number), f"{number:.17e}", f"{number:,.9f}"):
        found = parse.scibench_number(f"The answer is ${spelled_}$ m.")
        assert found == pytest.approx(number, rel=1e-3)


@pytest.mark.parametrize(
    ("number", "target", "close"),
    [(104.9, 100, True), (105.5, 100, False), (-1, 1, False), (None, 1, False), (0, 0, True)],
)
def test_tolerance_of_scibench(number: float | None, target: float, close: bool) -> None:
    assert parse.close_enough(number, target) is close
    assert not parse.close_enough(float("nan"), target)


def test_the_origin_of_a_benchmark_that_is_one_file(tmp_path: Path) -> None:
    """The first pattern that matches is read, all its files, in the order of their names."""
    origin = Origin(("a/*.jsonl", "b.jsonl"), "somewhere", keys=(("n",),))
    write_lines(tmp_path / "b.jsonl", [{"n": 0}])
    assert read_rows(origin, tmp_path)[0] == ({"n": 0},)
    write_lines(tmp_path / "a/2.jsonl", [{"n": 2}])
    write_lines(tmp_path / "a/1.jsonl", [{"n": 1}])
    rows, digests = read_rows(origin, tmp_path)
    assert [row["n"] for row in rows] == [1, 2]
    assert list(digests) == ["a/1.jsonl", "a/2.jsonl"]
    with pytest.raises(EvaluationError, match="somewhere"):
        read_rows(replace(origin, paths=("c",)), tmp_path)


def test_an_unknown_suite_is_told_in_whole_sentences() -> None:
    assert "of that name. The suites are smoke, " in str(unknown("xyzzyq", []))
    assert "did you mean smoke? The suites are" in str(unknown("smoek", []))
