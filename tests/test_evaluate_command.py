"""`fusellm evaluate`: the models of a run, and any models, by suites."""

import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusellm.cli.main import main
from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError, RecipeError
from fusellm.evaluation import measure
from fusellm.evaluation.code import tasks as multiple
from fusellm.evaluation.code.completions import Written
from fusellm.evaluation.code.sandbox import Sandbox
from fusellm.evaluation.compare.records import read_record
from fusellm.evaluation.harness.run import HarnessTask
from fusellm.recipe_file import check_recipe, load_recipe, resolve_paths
from fusellm.stages.evaluate import measured_nats
from fusellm.store.run_folder import SUITES
from stores import flip
from test_report import Page

MODELS = ["first", "second", "target", "clm", "fused"]
TASKS = ["patterns", "agreement", "recall"]
SMALL = ("--suite", "smoke", "--limit", "6")


class Command:
    """Runs commands in this process, and counts the models that are loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.loaded: list[str] = []
        load = measure.load_model

        def counted(located: Any, *arguments: Any) -> Any:
            self.loaded.append(Path(located.settings.model).name)
            return load(located, *arguments)

        monkeypatch.setattr(measure, "load_model", counted)

    def __call__(self, *arguments: object) -> str:
        """What a command that works prints."""
        code, printed, errors = self.tried(*arguments)
        assert code == 0, errors
        return printed

    def fault(self, *arguments: object) -> str:
        """The one line of a command that fails, before any model is loaded."""
        before = list(self.loaded)
        code, printed, errors = self.tried(*arguments)
        assert code == 1
        assert printed == ""
        bars = ("trying toolchains", "checking lengths")
        lines = [line for line in errors.splitlines() if not line.startswith(bars)]
        assert len(lines) == 1, errors
        assert self.loaded == before
        return lines[0].removeprefix("fusellm: ")

    def tried(self, *arguments: object) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["fusellm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed, errors = self._capsys.readouterr()
        return int(stop.value.code or 0), printed, errors


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without suites, as runs were before there were any."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["fusellm", "run", str(world / "recipe.yaml"), "--out", str(run)]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def record_of(folder: Path, model: str, task: str, suite: str = "smoke") -> Path:
    return folder / suite / model / f"{task}.jsonl"


# A run


def test_the_models_of_a_run_are_measured_once(run: Path, command: Command) -> None:
    manifest = (run / "evaluate" / "manifest.json").read_bytes()
    document = json.loads(command("evaluate", run, *SMALL, "--json"))
    assert list(document) == ["suites"]
    (suite,) = document["suites"]
    assert suite["suite"] == "smoke"
    assert suite["models"] == MODELS
    assert [line["task"] for line in suite["tasks"]] == TASKS
    assert [line["n"] for line in suite["tasks"]] == [6, 6, 6]
    pairs = [(one["a"], one["b"]) for one in suite["mean"]["differences"]]
    assert pairs == [("fused", "target"), ("fused", "clm")]
    # `target` is the model of `first`, which is not measured a second time.
    assert command.loaded == ["llama", "neox", "clm", "fused"]
    for model in MODELS:
        for task in TASKS:
            record = read_record(record_of(run / SUITES, model, task))
            assert record.header.model["name"] == model
            scored = 100 * sum(answer.score for answer in record.answers) / 6
            line = next(line for line in suite["tasks"] if line["task"] == task)
            assert line["scores"][model] == pytest.approx(scored)
    assert json.loads(command("evaluate", run, *SMALL, "--json")) == document
    assert len(command.loaded) == 4
    shown = command("evaluate", run, *SMALL)
    for part in ("patterns", "target before training", "fused − CLM", "95 %", "On the mean over"):
        assert part in shown
    assert len(command.loaded) == 4
    assert (run / "evaluate" / "manifest.json").read_bytes() == manifest
    assert not load_recipe(run / "recipe.yaml").evaluation.suites


def test_saved_tables(run: Path, tmp_path: Path, command: Command) -> None:
    files = [tmp_path / f"t.{ending}" for ending in ("md", "csv", "json")]
    saves = [part for file in files for part in ("--save", file)]
    printed = command("evaluate", run, "--suite", "lm", *SMALL, "--published", "--json", *saves)
    document = json.loads(printed)
    assert {record["task"] for record in document["lm"]} == {"prose", "code", "mean"}
    assert json.loads(files[2].read_text()) == document
    rows = list(csv.DictReader(files[1].open()))
    values = {(row["suite"], row["task"], row["model"]): row for row in rows}
    lm = next(r for r in document["lm"] if (r["model"], r["task"]) == ("fused-clm", "mean"))
    assert float(values["lm", "mean", "fused-clm"]["value"]) == lm["value"]
    (suite,) = document["suites"]
    assert float(values["smoke", "mean", "fused"]["value"]) == suite["mean"]["scores"]["fused"]
    text = files[0].read_text()
    assert text.index("## lm") < text.index("| bits per byte |") < text.index("## smoke")
    assert "| patterns |" in text


def test_only_bits_per_byte_where_nothing_else_is_asked_for(run: Path, command: Command) -> None:
    whole = json.loads(command("evaluate", run, "--json"))
    assert {record["metric"] for record in whole} == {"bits_per_byte"}
    assert json.loads(command("evaluate", run, "--suite", "lm", "--json")) == whole
    assert command.loaded == []
    assert not (run / SUITES).exists()


def state_of_suites(command: Command, run: Path) -> dict[str, Any]:
    states = json.loads(command("status", run, "--json"))
    return next(state for state in states if state["stage"] == SUITES)


def test_an_interrupted_evaluation_goes_on(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str]] = []
    real = HarnessTask.run

    def run_task(task: Any, loaded: Any, facts: Any, *rest: Any) -> Any:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((facts["name"], task.header.task))
        return real(task, loaded, facts, *rest)

    monkeypatch.setattr(HarnessTask, "run", run_task)
    code, _, errors = command.tried("evaluate", run, *SMALL)
    assert code == 130
    assert "the same command goes on from here" in errors
    state = state_of_suites(command, run)
    assert (state["stage"], state["complete"], state["shards"]) == (SUITES, False, 4)
    assert "smoke" not in command("report", run)
    ran.insert(0, ("", ""))
    ran_before = len(ran)
    command("evaluate", run, *SMALL)
    assert ran[ran_before:] == [
        ("second", "agreement"),
        ("second", "recall"),
        *((model, task) for model in ("clm", "fused") for task in TASKS),
    ]
    state = state_of_suites(command, run)
    assert (state["complete"], state["shards"]) == (True, 15)


def test_other_settings_need_a_redo(run: Path, command: Command) -> None:
    command("evaluate", run, *SMALL)
    path = record_of(run / SUITES, "first", "patterns")
    before = path.read_bytes()
    fault = command.fault("evaluate", run, "--suite", "smoke", "--limit", "5")
    assert f"{path} was made from something else: protocol.limit was 6 and is now 5" in fault
    assert "So were 14 more" in fault
    assert path.read_bytes() == before
    assert list(json.loads((run / SUITES / "index.json").read_text())) == ["smoke"]
    command("evaluate", run, "--suite", "smoke", "--limit", "5", "--redo")
    assert len(read_record(path).answers) == 5
    (moved,) = (run / SUITES / "aside").glob("*/smoke/first/patterns.jsonl")
    assert moved.read_bytes() == before
    command("clean", run, "--yes")
    assert not moved.exists()
    assert path.exists()
    command("clean", run, "--all", "--yes")
    assert not run.exists()


def test_training_anew_keeps_what_the_sources_answered(
    run: Path, world: Path, command: Command
) -> None:
    command("evaluate", run, *SMALL)
    command.loaded.clear()
    recipe = (world / "recipe.yaml", "--out", run, "--set", "training.clm.learning_rate=2e-3")
    command("train", *recipe, "--redo")
    assert "smoke" not in command("evaluate", run, "--suite", "lm")
    command("evaluate", run, *SMALL)
    assert command.loaded == ["clm"]


@pytest.mark.parametrize("damaged", [False, True])
def test_training_anew_keeps_what_the_held_out_text_cost_the_others(
    run: Path, world: Path, command: Command, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    measured = []

    def counted(name: str, *given: Any) -> Any:
        measured.append(name)
        return measured_nats(name, *given)

    monkeypatch.setattr("fusellm.stages.evaluate.measured_nats", counted)
    before = (run / "evaluate" / "fused.arrow").read_bytes()
    recipe = (world / "recipe.yaml", "--out", run, "--set", "training.clm.learning_rate=2e-3")
    command("train", *recipe, "--redo")
    if damaged:
        aside = run / "aside" / "1" / "evaluate" / "fused.arrow"
        flip(aside, len(before) // 2)
    command("evaluate", run, "--suite", "lm")
    assert sorted(measured) == (["clm", "fused"] if damaged else ["clm"])
    assert (run / "evaluate" / "fused.arrow").read_bytes() == before


# A recipe with suites


def test_a_recipe_with_suites(
    finished: Path, world: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    raw = yaml.safe_load((world / "recipe.yaml").read_text())
    raw["evaluation"] |= {"suites": ["smoke"], "limit": 8, "tasks": ["patterns", "recall"]}
    recipe = world / "with-suites.yaml"
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    document = json.loads(command("run", recipe, "--out", run, "--json"))
    assert {record["metric"] for record in document["lm"]} == {"bits_per_byte"}
    assert [line["task"] for line in document["suites"][0]["tasks"]] == ["patterns", "recall"]
    assert sorted(path.name for path in (run / SUITES).iterdir()) == ["index.json", "smoke"]
    records = json.loads((run / "report" / "results.json").read_text())
    (mean,) = (r for r in records if (r["model"], r["task"]) == ("fused-target", "smoke/mean"))
    assert mean["low"] <= mean["value"] <= mean["high"]
    rows = list(csv.DictReader((run / "report" / "results.csv").open()))
    assert len(rows) == len(records)
    page = (run / "report" / "index.html").read_text()
    assert "fused − CLM in points on smoke: patterns" in page
    assert "no difference shown" in page
    assert Page(page).open == []
    count = len(command.loaded)
    again = json.loads(command("evaluate", run, "--json"))
    assert again == document
    assert command.loaded[count:] == []
    only = json.loads(command("evaluate", run, "--suite", "lm", "--json"))
    assert only == document["lm"]


def test_a_run_whose_suites_lack_data_does_not_begin(
    world: Path, tmp_path: Path, command: Command
) -> None:
    settings = ("--set", "evaluation.suites=[bbh]", "--set", "evaluation.data_dir=nothing")
    fault = command.fault("run", world / "recipe.yaml", "--out", tmp_path / "run", *settings)
    assert fault == f"there is no data folder {world / 'nothing'}; check the path"
    assert not (tmp_path / "run").exists()
    assert "no data folder" in command.fault("check", world / "recipe.yaml", *settings)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"suite": ["x"]}, "unknown key evaluation.suite; did you mean suites?"),
        ({"samples": 4}, "samples: 4 at temperature 0 are all equal"),
        ({"pass_at": 2}, "pass_at: 2 needs as many samples, and samples is 1"),
        ({"limit": 0}, "evaluation.limit: "),
        ({"too_long": "cut"}, "evaluation.too_long: "),
    ],
)
def test_settings_that_are_refused(world: Path, changes: dict[str, Any], part: str) -> None:
    raw = yaml.safe_load((world / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match=part):
        check_recipe(raw | {"evaluation": changes}, "some.yaml")


def test_folders_of_a_recipe_are_beside_it(world: Path, tmp_path: Path) -> None:
    changes = ["evaluation.data_dir=data", "evaluation.toolchains=[tools, /opt/x]"]
    found = resolve_paths(load_recipe(world / "recipe.yaml", changes), world).evaluation
    assert found.data_dir == str(world / "data")
    assert found.toolchains == [str(world / "tools"), "/opt/x"]
    assert resolve_paths(load_recipe(world / "recipe.yaml"), world).evaluation == (
        EvaluationSettings(resamplings=200)
    )


# Any models


@pytest.fixture
def models(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of models with names that a table must not read as markup."""
    monkeypatch.chdir(tmp_path)
    for name, source in {"[red]one": "llama", "two": "neox", "three": "llama"}.items():
        shutil.copytree(world / source, tmp_path / name)
    return tmp_path


def test_models_without_a_run(models: Path, command: Command) -> None:
    names = ("[red]one", "two", "three")
    document = json.loads(command("evaluate", *names, *SMALL, "--json"))
    (suite,) = document["suites"]
    assert suite["models"] == list(names)
    pairs = [(one["a"], one["b"]) for one in suite["mean"]["differences"]]
    assert pairs == [("two", "[red]one"), ("three", "[red]one")]
    assert command.loaded == ["[red]one", "two"]  # the third is the first
    assert suite["mean"]["differences"][1]["value"] == 0
    assert record_of(models / "runs" / "evaluation", "two", "recall").exists()
    assert "two − [red]one" in command("evaluate", *names, *SMALL)
    assert len(command.loaded) == 2
    other = ("--out", models / "other", "--set", "dtype=bfloat16")
    command("evaluate", "two", *SMALL, *other)
    header = read_record(record_of(models / "other", "two", "recall")).header
    assert header.model["precision"] == "bfloat16"


def test_faults_are_found_before_any_work(
    models: Path, run: Path, world: Path, command: Command
) -> None:
    (models / "data").mkdir()
    cases: dict[tuple[object, ...], str] = {
        (): "there is nothing to evaluate: name a run, a recipe, or models",
        ("two",): "--suite says what models are measured by; --list shows",
        ("two", "--suite", "lm"): "lm is of a run's held-out text, and these are models",
        (run, "two", *SMALL): f"{run} is a run or a recipe, which is evaluated alone",
        ("two", "two", *SMALL): "a model is named twice",
        (models / "data", *SMALL): "is neither a run (it has no recipe.yaml) nor a model",
        (models / "none", *SMALL): "there is no model folder",
        ("zoo/rust", *SMALL): "there is no zoo/rust; the zoo has zoo/prose",
        ("none.yaml", *SMALL): "there is no recipe none.yaml",
        (run, *SMALL, "--tasks", "recal"): "smoke has no task 'recal'; it has patterns",
        (run, *SMALL, "--save", "x.txt"): "x.txt is no name for a table: end it in .md, .csv",
        (run, *SMALL, "--save", "no/x.md"): "there is no folder no; make it first",
        (run, *SMALL, "--set", "evaluation.limt=1"): "unknown key evaluation.limt; did you mean",
        ("two", *SMALL, "--set", "dtyp=x"): "unknown key dtyp; did you mean dtype?",
        (run, "--suite", "bbh"): "no data folder was given to find",
        (run, "--suite", "textgen", "--data-dir", "data"): "data has no triviaqa.parquet",
        (run, "--suite", "multiple", "--samples", "3"): "samples: 3 at temperature 0",
        (run, "--suite", "multiple"): "name it: evaluation.data_dir, or --data-dir",
        (world / "recipe.yaml", "--out", "new", *SMALL): "not finished; first: fusellm train new",
    }
    for arguments, part in cases.items():
        assert part in command.fault("evaluate", *arguments), arguments


def test_prompts_that_do_not_fit_are_found_before_any_model_is_loaded(
    models: Path, command: Command
) -> None:
    path = models / "three" / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 24}
    path.write_text(json.dumps(config))
    fault = command.fault("evaluate", "two", "three", *SMALL)
    assert fault.startswith("three: ")
    assert "of smoke/patterns have prompts longer than the model reads" in fault
    assert "--too-long truncate cuts them from the left" in fault
    document = json.loads(command("evaluate", "three", *SMALL, "--too-long", "truncate", "--json"))
    assert document["suites"][0]["tasks"][0]["truncated"]["three"] > 0


def test_a_missing_extra_is_named(
    models: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'fusellm[eval]'" in command.fault("evaluate", "two", *SMALL)


def test_the_list_of_suites(models: Path, command: Command) -> None:
    folder = models / "data" / "bbh"
    folder.mkdir(parents=True)
    (folder / "navigate.json").write_text("{}")
    (models / "data" / "HumanEval.jsonl").write_text("{}")
    listed = json.loads(command("evaluate", "--list", "--data-dir", "data", "--json"))
    rows = {row["suite"]: row for row in listed}
    assert list(rows) == [
        *("smoke", "lm", "bbh", "bbh_harness", "commonsense", "textgen", "multiple", "humaneval")
    ]
    assert rows["smoke"]["at_hand"] == sorted(TASKS)
    assert rows["bbh_harness"]["at_hand"] == ["navigate"]
    assert rows["bbh"]["at_hand"] == []  # its prompt is missing
    assert rows["multiple"]["at_hand"] == ["python"]
    assert rows["humaneval"]["at_hand"] == ["humaneval"]
    assert "MultiPL-E" in rows["multiple"]["missing"]["cpp"]
    assert rows["bbh"]["documents"] == 6511
    shown = command("evaluate", "--list")
    assert "At hand: no." in shown
    assert "6,511 documents" in shown


# Programs


PROBLEMS = {
    "js": {
        "name": "one",
        "language": "js",
        "prompt": "function one() {\n",
        "tests": "if (one() !== 1) { throw new Error('no'); }\n",
        "stop_tokens": ["\n}"],
    },
    "python": {
        "name": "one",
        "language": "py",
        "prompt": "def one():\n",
        "tests": "assert one() == 1\n",
        "stop_tokens": ["\ndef"],
    },
}


@pytest.fixture
def problems(models: Path) -> Path:
    """Two problems of each of two languages, as MultiPL-E's files."""
    folder = models / "data" / "multipl-e"
    folder.mkdir(parents=True)
    for key, row in PROBLEMS.items():
        rows = [row, row | {"name": "two"}]
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / f"humaneval-{key}.jsonl").write_text(text)
    return models / "data"


def writer(texts: Sequence[str]) -> Callable[..., list[Written]]:
    """In the place of `complete`: samples for each prompt in turn; the last prompt was cut."""

    def complete(_loaded: Any, prompts: Sequence[str], _stop: Any, writing: Any, *_: Any) -> Any:
        assert len(texts) == writing.samples
        return [Written(list(texts), n == len(prompts) - 1) for n in range(len(prompts))]

    return complete


def test_programs_are_judged_in_the_sandbox(
    sandbox: Sandbox, problems: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiple, "complete", writer(["\n    return 1", "\n    return 2"]))
    asked = ("--tasks", "python", "--tasks", "cpp", "--tasks", "js")
    settings = ("--samples", "2", "--temperature", "0.5", "--data-dir", problems, *asked)
    arguments = ("evaluate", "two", "--suite", "multiple", "--max-new-tokens", "16", *settings)
    document = json.loads(command(*arguments, "--json"))
    (suite,) = document["suites"]
    reasons = {one["task"]: one["reason"] for one in suite["not_run"]}
    lines = {line["task"]: line for line in suite["tasks"]}
    assert set(reasons) | set(lines) == {"python", "cpp", "js"}
    assert "humaneval-cpp.jsonl is missing" in reasons["cpp"]
    assert lines["python"]["unit"] == "pass@1"
    assert lines["python"]["scores"] == {"two": 50.0}
    assert lines["python"]["truncated"] == {"two": 1}
    record = read_record(
        record_of(problems.parent / "runs/evaluation", "two", "python", "multiple")
    )
    assert [answer.score for answer in record.answers] == [1, 0, 1, 0]
    assert record.header.kind == "samples"
    assert record.header.protocol["language"] == "python"
    assert record.header.protocol["writing"] == {
        "max_new_tokens": 16,
        "samples": 2,
        "temperature": 0.5,
        "top_p": 1.0,
    }
    assert list(record.header.data) == ["multipl-e/humaneval-python.jsonl"]
    assert "Not run: cpp (" in " ".join(command(*arguments).split())
    assert command.loaded == ["two"]
    of_two = json.loads(command(*arguments, "--pass-at", "2", "--json"))["suites"][0]["tasks"]
    assert of_two[0]["unit"] == "pass@2"
    assert of_two[0]["scores"] == {"two": 100.0}
    assert command.loaded == ["two"]


def test_humaneval_gives_prompts_as_published(
    sandbox: Sandbox, problems: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line end that `multiple` takes away, from HumanEval's own file."""
    row = {key: PROBLEMS["python"][key] for key in ("prompt", "name")}
    row |= {"test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    (problems / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    seen: list[str] = []

    def complete(_loaded: Any, prompts: Sequence[str], *_: Any) -> list[Written]:
        seen.extend(prompts)
        return [Written(["    return 1"], False) for _ in prompts]

    monkeypatch.setattr(multiple, "complete", complete)
    suites = ("--suite", "humaneval", "--suite", "multiple")
    asked = ("--tasks", "humaneval", "--tasks", "python", "--data-dir", problems)
    asked += ("--max-new-tokens", "16")
    document = json.loads(command("evaluate", "two", *suites, *asked, "--json"))
    published, stripped = document["suites"]
    assert seen == ["def one():\n", "def one():", "def one():"]
    assert [line["scores"]["two"] for line in published["tasks"]] == [100.0]
    assert [line["task"] for line in stripped["tasks"]] == ["python"]
    fault = command.fault("evaluate", "two", *suites[:2], "--tasks", "go", "--data-dir", problems)
    assert "humaneval has no task 'go'; it has humaneval" in fault


def test_a_model_writes_programs(sandbox: Sandbox, problems: Path, command: Command) -> None:
    settings = ("--data-dir", problems, "--tasks", "python", "--max-new-tokens", "8")
    arguments = ("evaluate", "two", "[red]one", "--suite", "multiple", *settings, "--json")
    (suite,) = json.loads(command(*arguments))["suites"]
    assert suite["tasks"][0]["n"] == 2
    assert suite["tasks"][0]["scores"] == {"two": 0.0, "[red]one": 0.0}


def test_nothing_is_run_without_a_sandbox(
    problems: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Any) -> Any:
        raise EvaluationError(
            "generated programs are run in a sandbox only: apt install bubblewrap"
        )

    monkeypatch.setattr(multiple, "find_sandbox", none)
    arguments = ("evaluate", "two", "--suite", "multiple", "--data-dir", problems)
    assert "apt install bubblewrap" in command.fault(*arguments)
