"""The command line as a person meets it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from tokenizers import Tokenizer, models, pre_tokenizers

from fusellm.cli.main import app, main
from fusellm.recipe_file import load_recipe
from fusellm.store.identity import Identity
from fusellm.store.manifest import Manifest


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fusellm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def real(*arguments: str) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fusellm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_run_killed_and_run_again_gives_the_same_results(world: Path, tmp_path: Path) -> None:
    """The real command, killed with SIGKILL once the first shard is there."""
    command = ("run", str(world / "recipe.yaml"), "--json", "--out")
    whole, whole_errors = real(*command, str(tmp_path / "whole")).communicate(timeout=240)
    assert whole, whole_errors
    broken = real(*command, str(tmp_path / "broken"))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("broken/externalize/first/train-*.arrow")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    again, errors = real(*command, str(tmp_path / "broken")).communicate(timeout=240)
    assert json.loads(again) == json.loads(whole), errors
    models = {record["model"] for record in json.loads(again)}
    assert models == {"first", "second", "target", "clm", "fused", "fused-clm"}


def test_stages_status_check_and_clean(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    recipe = str(world / "recipe.yaml")
    assert run(monkeypatch, "check", recipe, "--json", "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["second"]["architecture"] == "GPTNeoXForCausalLM"
    assert not (tmp_path / "run").exists()
    assert run(monkeypatch, "fuse", recipe, "--out", out) == 1
    assert "fusellm corpus" in capsys.readouterr().err
    for stage in ("corpus", "externalize"):
        assert run(monkeypatch, stage, recipe, "--out", out) == 0
    assert run(monkeypatch, "fuse", out, "--json") == 0  # the run serves as well as the recipe
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)}
    assert stages["fuse"]["complete"]
    assert run(monkeypatch, "status", out) == 0
    assert "externalize/second" in capsys.readouterr().out
    assert_status_tells_of_a_training(tmp_path / "run", monkeypatch, capsys)
    assert run(monkeypatch, "clean", out, "--stores", "--yes") == 1
    assert "still needs" in capsys.readouterr().err
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run(monkeypatch, "clean", out, "--all", "--yes") == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert run(monkeypatch, "init", str(tmp_path / "recipe.yaml")) == 0
    assert run(monkeypatch, "clean", str(tmp_path), "--all", "--yes") == 1
    assert "holds no stage of a run" in capsys.readouterr().err


def assert_status_tells_of_a_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is fused: what is to come, and how far a training is that was interrupted."""

    def told() -> tuple[dict[str, Any], str]:
        assert run(monkeypatch, "status", str(folder)) == 0
        shown = capsys.readouterr().out
        assert run(monkeypatch, "status", str(folder), "--json") == 0
        return {row["stage"]: row for row in json.loads(capsys.readouterr().out)}, shown

    rows, shown = told()
    read = [f"externalize/{name}" for name in ("target", "first", "second")]
    done = ["corpus", *read, "fuse"]
    assert list(rows) == [*done, "train/fused", "train/clm", "evaluate", "report"]
    assert [name for name, row in rows.items() if row["begun"]] == done
    assert not any(row["complete"] for name, row in rows.items() if name not in done)
    assert shown.count("not begun") == 4
    trained, checkpoints = folder / "train" / "fused", folder / "train" / "fused-checkpoints"
    trained.mkdir(parents=True)
    manifest = Manifest(Identity("train", {}, {}), {})
    (trained / "manifest.json").write_bytes(manifest.to_bytes())
    assert told()[0]["train/fused"] | {"step": None, "begun": True} == told()[0]["train/fused"]
    for step, whole in ((9, True), (10, True), (11, False)):
        place = checkpoints / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text('{"max_steps": 1200}')
        if whole:
            (place / "saved-whole").write_text("{}")
    rows, shown = told()
    assert (rows["train/fused"]["step"], rows["train/fused"]["steps"]) == (10, 1200)
    assert "saved at step 10 of 1,200" in shown
    (checkpoints / "checkpoint-10" / "trainer_state.json").write_text("no state")
    assert (told()[0]["train/fused"]["step"], told()[0]["train/fused"]["steps"]) == (10, None)
    shutil.rmtree(folder / "train")


def test_faults_are_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(world / "recipe.yaml")
    cases = {
        ("run", str(tmp_path / "none.yaml")): "there is no recipe",
        ("run", str(tmp_path)): "is not a run",
        (
            "run",
            recipe,
            "--set",
            "objective.lamda=1",
        ): "unknown key objective.lamda; did you mean lambda?",
        ("run", recipe, "--set", "training.learning_rat=1"): "did you mean learning_rate?",
        ("run", recipe, "--set", "training.output_dir=x"): "the run's folder is set with --out",
        ("run", recipe, "--set", "training.clm.learning_rat=1"): "unknown key training.clm.learn",
        ("run", recipe, "--set", "fusion"): "must be KEY=VALUE",
        ("check", recipe, "--set", "target.model=/no/such"): "there is no model folder /no/such",
        ("check", recipe, "--set", "target.model=zoo/rust"): "there is no zoo/rust; the zoo has",
        ("status", str(tmp_path)): "is not a run",
        ("zoo", "train", "--only", "rust", "--out", str(tmp_path)): "the zoo has no 'rust'",
    }
    for arguments, message in cases.items():
        assert run(monkeypatch, *arguments) == 1, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err


def test_tokenizers_are_compared_before_any_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("the model reads a text = the model(3)\n" * 9, encoding="utf-8")
    pair = (str(world / "neox"), str(world / "llama"))
    assert run(monkeypatch, "tokenizers", *pair, "--text", str(text), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["source"]["kind"], found["target"]["kind"]) == ("byte-level", "SentencePiece")
    (domain,) = found["domains"]
    assert domain["name"] == "mine"
    assert sum(domain["situations"].values()) == domain["positions"] > 50
    assert domain["shares"]["aligned"] == pytest.approx(1 - domain["shares"]["unaligned"])
    for width in ("80", "120"):
        monkeypatch.setenv("COLUMNS", width)
        assert run(monkeypatch, "tokenizers", *pair, "--text", str(text)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(width)
        shown = "\n".join(lines)
        assert "of llama's positions neox has read the same text" in " ".join(shown.split())
        for word in ("A, source", "B, target", "unaligned", "mine", "<|endoftext|>", "classes"):
            assert word in shown
    assert run(monkeypatch, "tokenizers", pair[0], pair[0], "--text", str(text)) == 0
    assert "cut every text alike" in " ".join(capsys.readouterr().out.split())


def test_the_zoos_tokenizers_on_the_built_in_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "tokenizers", "zoo/python", "zoo/prose", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [domain["name"] for domain in found["domains"]] == ["prose", "python", "cpp"]
    for domain in found["domains"]:
        assert 90_000 < domain["bytes_read"] < 110_000
        assert domain["shares"]["same"] > 0.7
        assert domain["left_out"] == {"source": 0, "target": 0}


def test_faults_of_tokenizers_are_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words"
    words.mkdir()
    model = models.WordPiece({"[UNK]": 0, "the": 1, "##m": 2}, unk_token="[UNK]")
    wordpiece = Tokenizer(model)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.save(str(words / "tokenizer.json"))
    latin, empty, nothing = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "nothing"
    latin.write_bytes(b"caf\xe9")
    empty.write_bytes(b"")
    nothing.mkdir()
    llama = str(world / "llama")
    cases = {
        ("/no/such", llama): "there is no folder /no/such; check the path",
        (llama, "zoo/rust"): "there is no zoo/rust; the zoo has",
        (str(nothing), llama): "holds no tokenizer that can be loaded (it holds: nothing)",
        (str(world / "prose.jsonl"), llama): "is a file; give the folder",
        ("no-such-user/no-such-model", llama): "there is no folder of the tokenizer",
        (str(words), llama): "cannot be told as bytes; choose a model",
        (llama, llama, "--text", str(tmp_path / "none")): "cannot be read",
        (llama, llama, "--text", str(latin)): "is not UTF-8 (byte 3)",
        (llama, llama, "--text", str(empty)): "is empty",
    }
    for arguments, message in cases.items():
        assert run(monkeypatch, "tokenizers", *arguments) == 1, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.splitlines()[-1].startswith("fusellm: ")
        assert "Traceback" not in captured.err


def test_a_usage_error_names_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", "--lambda", "3") == 2
    assert "--lambda" in capsys.readouterr().err


def test_init_writes_a_recipe_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert run(monkeypatch, "init", str(path)) == 0
    assert load_recipe(path).objective.lambda_ == 0.5
    assert run(monkeypatch, "check", str(path)) == 0
    assert run(monkeypatch, "init", str(path)) == 1
    assert "exists already" in capsys.readouterr().err


def test_schema_names_the_recipes_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert "lambda" in schema["$defs"]["ObjectiveSettings"]["properties"]


@pytest.mark.parametrize("command", ["run", "check", "clean", "zoo", "tokenizers", "merge"])
def test_help_teaches(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_the_command_line_imports_nothing_heavy() -> None:
    """`fusellm --help` answers at once."""
    code = (
        "import sys, fusellm.cli.main; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_recipe_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """By every command that reads one: torch and transformers take many seconds."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: wrong\ntarget: zoo/prose\nsources: [{name: a, model: zoo/cpp}]\n"
        "corpus: {documents: [{builtin: prose}]}\nobjective: {lamda: 0.5}\n",
        encoding="utf-8",
    )
    stages = ("run", "corpus", "externalize", "fuse", "train", "evaluate", "report", "check")
    commands = [[name, str(folder)] for name in (*stages, "status")]
    commands += [[name, str(tmp_path / "none.yaml")] for name in stages]
    commands += [["inspect", str(folder), "--block", "0"], ["evaluate", "zoo/prose"]]
    code = (
        "import json, sys\nfrom fusellm.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = arguments\n"
        "    try:\n        main()\n"
        "    except SystemExit as stop:\n        assert stop.code == 1, arguments\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), arguments\n"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = ended.stderr.splitlines()
    assert len(told) == len(commands), ended.stderr
    assert sum("unknown key objective.lamda; did you mean lambda?" in line for line in told) == 10
    assert sum("there is no recipe" in line for line in told) == len(stages)


def test_options_are_of_types_that_the_lowest_typer_takes() -> None:
    """A Literal is one from 0.19 on; before, no command at all would begin."""

    def callbacks(group: typer.Typer) -> Iterator[Callable[..., Any]]:
        yield from (one.callback for one in group.registered_commands if one.callback)
        for under in group.registered_groups:
            assert under.typer_instance is not None
            yield from callbacks(under.typer_instance)

    def literals(kind: Any) -> bool:
        return get_origin(kind) is Literal or any(literals(part) for part in get_args(kind))

    every = [signature(callback, eval_str=True) for callback in callbacks(app)]
    assert len(every) > 15
    assert any(literals(one.annotation) for own in every for one in own.parameters.values())
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert "typer>=0.19" in project["project"]["dependencies"]
