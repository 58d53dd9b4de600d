"""The doors of the command line: whose code runs, what a terminal is sent, and how commands end."""

import json
import os
import pty
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from rich.table import Table

from conftest import Command
from fusellm.cli import ending
from fusellm.cli.console import SafeConsole, Terminal, json_text, shown
from fusellm.cli.main import main
from fusellm.config import ModelSettings
from fusellm.errors import EvaluationError, ModelError, StoreError
from fusellm.explain.machine import examine
from fusellm.models.load import locate
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.now import Published, now_of
from fusellm.store.run_folder import NOW

PATIENCE_SECONDS = 240  # until a command trains, on a machine that has much else to do


# Whose code runs


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done."""
    run = tmp_path_factory.mktemp("doors") / "run"
    recipe = resolve_paths(load_recipe(world / "recipe.yaml"), world)
    Pipeline(recipe, run, Silent()).execute()
    return run


@pytest.fixture
def others(finished: Path, world: Path, tmp_path: Path) -> Path:
    """A run that somebody else made: a model in it has code, and its recipe trusts that."""
    run = tmp_path / "others"
    shutil.copytree(finished, run)
    bring_code(world / "neox", run / "model")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["sources"][1] |= {"model": "model", "trust_remote_code": True}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return run


def bring_code(model: Path, folder: Path) -> None:
    """A copy of a model, with code of its own that leaves a file `ran` beside the folder."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import GPTNeoXConfig, GPTNeoXForCausalLM\n"
        f"Path({str(folder.parent / 'ran')!r}).touch()\n"
        "class Own(GPTNeoXConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(GPTNeoXForCausalLM):\n    config_class = Own\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["inspect", "", "--block", "1"], 1, "comes with code of its own"),
        (["report", ""], 0, "Report: "),
        (["status", ""], 0, "externalize/second"),
        (["store", "cat", "/externalize/second"], 0, "block "),
        (["store", "verify", ""], 0, "whole"),
        (["check", ""], 1, "Read it, then give --trust-remote-code"),
        (["run", ""], 1, "Read it, then give --trust-remote-code"),
        (["train", ""], 1, "/model/own.py"),
        (["evaluate", "", "--suite", "lm"], 1, "Read it, then give --trust-remote-code"),
        (["evaluate", "/model", "--suite", "smoke"], 1, "comes with code of its own"),
        (["tokenizers", "/model", "/model"], 0, "cut every text alike"),
        (
            ["merge", "/model", "/model", "--method=slerp", "--out=no"],
            1,
            "which a merge does not run",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_file_lets_code_run(
    others: Path, command: Command, arguments: list[str], code: int, part: str
) -> None:
    """Every command over somebody else's run, as its recipe stands."""
    words = [f"{others}{word}" if word[:1] in ("", "/") else word for word in arguments]
    ended, out, errors = command(*words)
    assert not (others / "ran").exists()
    assert (ended, part in " ".join((out + errors).split())) == (code, True), out + errors
    assert "Traceback" not in errors


def test_whoever_types_the_command_lets_code_run(others: Path, command: Command) -> None:
    """And is told of which model and files, before."""
    code, _, errors = command("check", others, "--trust-remote-code")
    assert code == 0, errors
    assert f"running code that comes with {others}/model: {others}/model/own.py" in errors
    assert (others / "ran").exists()


def test_trust_is_given_to_the_models_that_the_recipe_names(others: Path, command: Command) -> None:
    untrusted = ("--set", "sources.1.trust_remote_code=false")
    code, _, errors = command("check", others, "--trust-remote-code", *untrusted)
    assert code == 1
    assert "its entry in the recipe says trust_remote_code: true" in errors
    assert not (others / "ran").exists()
    settings = ModelSettings(model=str(others / "model"), trust_remote_code=True)
    with pytest.raises(ModelError, match="comes with code of its own"):
        locate(settings)  # as a library: trusted is an argument of its own
    assert locate(settings, trusted=True).runs_code


def test_code_of_other_repositories_is_named(others: Path, command: Command) -> None:
    path = others / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": ["someone/else--slow.Slow", None]}
    path.write_text(json.dumps(settings))
    assert "someone/else/slow.py" in command("check", others)[2]


# What a terminal is sent

RED, TITLE, BELL = "\x1b[31m", "\x9d0;mine\x9c", "\x07"
HOSTILE = f"{RED}{TITLE}{BELL}[/bold][red]\u202e\udc80:smile:"


def test_what_a_terminal_obeys_becomes_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    console = SafeConsole()
    console.print(HOSTILE)
    Terminal(console).say(HOSTILE)
    with Terminal(console).start(HOSTILE, 1, HOSTILE) as bar:
        bar.advance(1, HOSTILE)
    print(json_text({HOSTILE: HOSTILE}))
    out = capsys.readouterr().out
    assert not any(sign in out for sign in "\x1b\x07\x9d\x9c\u202e\udc80")
    assert out.count("[/bold][red]") == 7
    assert "\N{SYMBOL FOR ESCAPE}[31m" in out
    assert json.loads(out.splitlines()[-1]) == {HOSTILE: HOSTILE}
    assert shown("naïve café, 数字, 👩‍🔬\t|\n") == "naïve café, 数字, 👩‍🔬\t|\n"


def test_names_in_recipes_are_shown_as_text(
    world: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, values, folders, an architecture."""
    monkeypatch.setenv("COLUMNS", "400")  # a table folds what is long
    folder = tmp_path / f"{RED}[/bold]mine"
    shutil.copytree(world, folder)
    config = json.loads((folder / "neox" / "config.json").read_text())
    config["architectures"] = [f"{RED}[/red]GPTNeoX"]
    (folder / "neox" / "config.json").write_text(json.dumps(config))
    for arguments, part in (
        (["check", folder / "recipe.yaml"], "[/red]GPT"),
        (["check", folder / "recipe.yaml", "--set", f"{HOSTILE[:-8]}=1"], "unknown key"),
        (["check", folder / "none.yaml"], "[/bold]mine"),
        (["check", folder], "[/bold]mine"),
        (["run", folder / "recipe.yaml", "--set", f"seed={RED}x"], "seed"),
    ):
        _, out, errors = command(*arguments)
        assert part in out + errors
        assert "\x1b" not in out + errors
        assert "Traceback" not in errors


def test_a_line_of_a_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(SafeConsole())
    terminal.say("x" * 300)
    with terminal.start("y" * 300, 0, "files") as bar:
        bar.advance(1)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert told[1].startswith("y" * 300 + ": 1 file in ")


# How commands end


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (StoreError("two\nlines"), 1, "fusellm: two lines\n"),
        (ValueError("cannot\nbe"), 70, "cannot be. Finished work is kept. --debug shows"),
        (KeyError(), 70, "it says no more"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "fusellm: /x: Permission denied (fusellm/cli/ending.py:",
        ),
        (MemoryError(), 70, "memory ran out"),
        (RecursionError("too deep"), 70, "unforeseen RecursionError"),
    ],
)
def test_whatever_is_raised_is_one_line(
    error: Exception, code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        ending.run(failing, debug=False)
    told = capsys.readouterr().err
    assert stop.value.code == code
    assert part in told
    assert told.count("\n") == 1
    with pytest.raises(type(error)):
        ending.run(failing, debug=True)


def test_the_place_is_the_last_line_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusellm.recipe_file.read_yaml", lambda text: text / 2)
    with pytest.raises(TypeError) as caught:
        load_recipe(Path(__file__))
    assert "unforeseen TypeError (fusellm/recipe_file.py:" in ending.line_of(caught.value)


@pytest.mark.parametrize("asked", [["--debug"], []])
def test_debug_shows_where_an_error_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fusellm", "status", str(tmp_path), *asked])
    if not asked:
        monkeypatch.setenv("FUSELLM_DEBUG", "1")
    with pytest.raises(StoreError, match="is not a run"):
        main()


STOPS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@STOPS
def test_signals_end_a_command_in_good_order(
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tidied = []

    def stopped() -> None:
        try:
            signal.raise_signal(number)
        finally:
            tidied.append(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(ending, "_leave_terminal", lambda: None)
    with pytest.raises(SystemExit) as stop:
        ending.run(stopped, debug=False)
    assert (stop.value.code, tidied) == (128 + number, [number])
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"
    assert signal.getsignal(number) == before


@STOPS
def test_a_stop_is_no_error_whatever_becomes_of_it(
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once in a thousand, a lock that is left halfway raises "release unlocked lock" instead."""

    class HalfMade:
        def __del__(self) -> None:
            raise AttributeError("'tqdm' object has no attribute 'pos'")

    def stopped() -> None:
        half = HalfMade()
        try:
            signal.raise_signal(number)
        except BaseException:
            del half
            raise RuntimeError("release unlocked lock") from None

    monkeypatch.setattr(ending, "_leave_terminal", lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with pytest.raises(SystemExit) as stop:
        ending.run(stopped, debug=False)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop:
            ending.run(lambda: (signal.raise_signal(signal.SIGHUP), sys.exit(0)), debug=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.value.code == 0


def test_a_terminal_that_is_closed_ends_a_training_with_a_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    """The real command in a terminal of its own, as over a connection that is lost."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "train")
    command = [sys.executable, "-m", "fusellm", "train", str(run), "--set", "training.max_steps=-1"]
    command += ["--set", "training.num_train_epochs=300", "--set", "training.save_steps=100000"]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + PATIENCE_SECONDS
    shown = b""
    while b"steps/s" not in shown:  # of the bar: it trains
        assert time.monotonic() < deadline, shown
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert list((run / "train" / "fused-checkpoints").glob("checkpoint-*/saved-whole"))


# What one expects of a command line


def test_version_and_help(command: Command) -> None:
    assert command("--version")[1].startswith("fusellm 0.")
    assert command("help")[1] == command("--help")[1]
    assert command("help", "store", "cat")[1] == command("store", "cat", "--help")[1]
    assert "Exit codes: 0 done; 1 something that you can mend" in " ".join(
        command("--help")[1].split()
    )


def test_a_folder_without_a_name_is_refused(world: Path, command: Command) -> None:
    code, _, errors = command("run", world / "recipe.yaml", "--out", "")
    assert code == 2
    assert "the name of the folder is empty" in errors


def test_init_where_there_is_no_folder(tmp_path: Path, command: Command) -> None:
    code, _, errors = command("init", tmp_path / "recipes" / "mine.yaml")
    assert code == 1
    assert errors == (
        f"fusellm: there is no folder {tmp_path / 'recipes'} for mine.yaml; make it first\n"
    )


def test_status_says_what_the_recipe_no_longer_has(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["sources"][1]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert "not in the recipe" in command("status", run)[1]
    rows = {row["stage"]: row for row in json.loads(command("status", run, "--json")[1])}
    assert not rows["externalize/second"]["in_recipe"]
    assert rows["externalize/first"]["in_recipe"]
    assert rows["externalize/target"]["in_recipe"]


def test_the_report_names_no_folder_of_this_machine(finished: Path, world: Path) -> None:
    page = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert str(world) not in page
    assert "prose.jsonl" in page


def test_a_folder_with_a_tool_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may be somebody else's, and generated programs read what is a toolchain."""
    from fusellm.errors import EvaluationError
    from fusellm.evaluation.code.sandbox.bubblewrap import _toolchain

    home = tmp_path / "home" / "me"
    (home / "bin").mkdir(parents=True)
    (home.parent / "bin").mkdir()
    (home / "sdk" / "bin").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for folder in (home, home.parent, Path("/")):
        with pytest.raises(EvaluationError, match="holds your home folder"):
            _toolchain(folder)
    with pytest.raises(EvaluationError, match="has no folder bin"):
        _toolchain(Path("/etc"))
    assert _toolchain(home / "sdk") == str(home / "sdk")


def test_what_is_somebody_elses_is_no_toolchain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Homes of this machine's people, places of everybody, and what looks like a home."""
    from fusellm.errors import EvaluationError
    from fusellm.evaluation.code.sandbox import bubblewrap

    other, homes, everybodys, elsewhere = (tmp_path / n for n in ("other", "homes", "all", "mnt"))
    mine = tmp_path / "mine"
    for folder in (mine, mine / ".local", other, homes, everybodys, elsewhere, elsewhere / "sdk"):
        (folder / "bin").mkdir(parents=True)
    (elsewhere / ".netrc").symlink_to("nowhere")
    (mine / "link").symlink_to(other)
    row = ("o", "x", 1000, 1000, "", str(other), "/bin/sh")
    monkeypatch.setenv("HOME", str(mine))
    monkeypatch.setattr(pwd, "getpwall", lambda: [pwd.struct_passwd(row)])
    monkeypatch.setattr(bubblewrap, "_HOMES", (homes,))
    monkeypatch.setattr(bubblewrap, "_EVERYBODYS", (everybodys / "tmp",))
    faults = {
        other: f"holds {other}",
        mine / "link": f"holds {other}",
        homes: f"holds {homes}",
        everybodys: f"holds {everybodys}/tmp",
        mine / ".local": "keeps settings and keys",
        elsewhere: r"has \.netrc in it",
    }
    for folder, fault in faults.items():
        with pytest.raises(EvaluationError, match=rf"^toolchain {folder} {fault}.*programs would"):
            bubblewrap._toolchain(folder)
    assert bubblewrap._toolchain(elsewhere / "sdk") == str(elsewhere / "sdk")


def test_the_processes_of_a_training_listen_to_this_machine_alone(
    finished: Path, tmp_path: Path
) -> None:
    """`--nproc`: whoever reaches a port could send pickles; and told to stop, all save."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "train")
    command = [sys.executable, "-m", "fusellm", "train", str(run), "--nproc", "2"]
    command += ["--set", "training.num_train_epochs=300", "--set", "training.save_steps=100000"]
    started = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline, ports = time.monotonic() + PATIENCE_SECONDS, set[str]()
    try:
        while not ((run / "train" / "fused" / "manifest.json").exists() and ports):
            assert time.monotonic() < deadline
            assert started.poll() is None
            ports |= listening(started.pid)
            time.sleep(0.1)
        time.sleep(3.0)
        ports |= listening(started.pid)
    finally:
        started.send_signal(signal.SIGTERM)
        ended = started.wait(60)
    assert ended == 128 + signal.SIGTERM
    assert ports == {"127.0.0.1"}
    assert list((run / "train" / "fused-checkpoints").glob("checkpoint-*/saved-whole"))


def listening(pid: int) -> set[str]:
    """Addresses that a process and its children listen on."""
    tree = {pid}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in tree:
            tree.add(int(folder.name))
    sockets = set()
    for one in tree:
        for link in Path(f"/proc/{one}/fd").glob("*"):
            try:
                sockets.add(str(link.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                address = bytes.fromhex(local.split(":")[0])[::-1]
                found.add(".".join(map(str, address)) if len(address) == 4 else address.hex())
    return found


def test_a_sign_takes_its_room_where_a_title_is_folded() -> None:
    """Laid out as nothing, its place would be cut off what follows."""
    console = SafeConsole()
    text = f"{'x' * (console.width - 3)}{RED}[/bold]mine"
    table = Table("-" * console.width, title=text)
    with console.capture() as laid:
        console.print(table)
    assert re.sub(r"\s", "", laid.get()).startswith(text.replace("\x1b", "␛"))


SECRET = "hf_" + "a1B2" * 8


def test_doctor_says_what_is_there_and_no_secret(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    code, out, err = command("doctor", "--out", tmp_path / "runs")
    assert code == 0
    assert "All that is needed is here." in out
    assert "transformers" in out
    assert SECRET not in out + err
    told = json.loads(command("doctor", "--json")[1])
    by_name = {one["name"]: one for one in told}
    assert by_name["token"]["value"] == "there is one"
    assert by_name["torch"]["value"] == torch.__version__
    assert by_name["bitsandbytes"]["cure"] in ("", "pip install 'fusellm[quantized]'")


@pytest.mark.parametrize(
    ("wanted", "value", "broken"),
    [
        ("numpy>=9000", "and >=9000 is needed", True),
        ("nobody-has-this>=1", "not installed", True),
        ('nobody-has-this>=1; extra == "lora"', "not installed", False),
    ],
)
def test_doctor_names_the_cure(
    wanted: str, value: str, broken: bool, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusellm.explain.machine.requires", lambda _: [wanted])
    code, out, _ = command("doctor")
    assert code == int(broken)
    assert value in out
    assert "pip install" in out


def test_doctor_where_nothing_can_be_written_or_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none(*_: Any) -> None:
        raise EvaluationError("bubblewrap is missing; apt-get install bubblewrap")

    monkeypatch.setattr("fusellm.explain.machine.find_sandbox", none)
    access = os.access

    def is_there(place: Any, how: int) -> bool:
        return how == os.F_OK and access(place, how)

    monkeypatch.setattr("fusellm.explain.machine.os.access", is_there)
    found = {one.name: one for one in examine(tmp_path)}
    assert found["bubblewrap"].cure.endswith("apt-get install bubblewrap")
    assert not found["bubblewrap"].needed
    assert found["runs"].needed
    assert found["runs"].cure == "name another place by --out"
    assert "HF_HOME" in found["models of the hub"].cure


def _as_if_training(run: Path, pid: int | None = None) -> None:
    """A run whose CLM baseline is not finished, as another process would leave it."""
    published = Published(Silent(), run)
    with published.working(), published.start("training clm", 100, "steps") as one:
        one.resize(100, 20)
        one.advance(10, "loss 2.310")
        one.advance(0.5)
        one.tell()
    now = json.loads((run / NOW[0]).read_text(encoding="utf-8"))
    if pid is not None:
        (run / NOW[0]).write_text(json.dumps(now | {"pid": pid, "updated": time.time() - 300}))


def test_status_says_what_a_run_is_doing(finished: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "train" / "clm")
    assert now_of(run) is not None  # what it did last
    _as_if_training(run)
    shown = " ".join(command("status", run)[1].split())
    assert "now (0 s ago): training clm: 30 of 100 steps" in shown
    assert "steps/s, " in shown
    assert "loss 2.310" in shown
    assert "GB of memory" in shown
    gone = subprocess.Popen(["true"])
    gone.wait()
    _as_if_training(run, gone.pid)
    assert "not running; when last heard of, 5 min ago: training clm" in command("status", run)[1]
    (run / NOW[0]).write_text("{}")
    assert "training clm" not in command("status", run)[1]


def test_status_is_watched_to_its_end(
    finished: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    aside = tmp_path / "clm"
    (run / "train" / "clm").rename(aside)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            aside.rename(run / "train" / "clm")  # it has been trained meanwhile

    monkeypatch.setattr("fusellm.cli.status.time.sleep", sleep)
    code, out, _ = command("status", run, "--watch", "--json")
    assert code == 0
    told = [json.loads(line) for line in out.splitlines()]
    assert len(told) == 3
    stages = [{row["stage"]: row["complete"] for row in look[0]["stages"]} for look in told]
    assert [look["train/clm"] for look in stages] == [False, False, True]
    assert told[0][0]["now"]["unit"]
    aside.mkdir()
    (run / "train" / "clm").rename(aside / "clm")
    gone = subprocess.Popen(["true"])
    gone.wait()
    _as_if_training(run, gone.pid)
    assert command("status", run, "--watch")[0] == 0  # whoever worked on it has gone
    shutil.rmtree(run / "train" / "clm", ignore_errors=True)
    (aside / "clm").rename(run / "train" / "clm")
    assert command("status", run, "--watch")[1].count("train/clm") == 1  # it is done: one look


def test_where_nothing_can_be_told_work_goes_on(tmp_path: Path) -> None:
    published = Published(Silent(), tmp_path / "nowhere")
    with published.working(), published.start("reading", 3, "blocks") as bar:
        bar.advance(3)
    assert not (tmp_path / "nowhere").exists()
    with Published(Silent(), tmp_path).start("looking", 3, "blocks") as bar:
        bar.advance(3)  # as `check` does: nobody works on the run
    assert now_of(tmp_path) is None


@pytest.mark.parametrize(
    "odd",
    [
        {"done": "x"},
        {"pid": "1"},
        {"pid": -1},
        {"left": float("inf")},
        {"updated": -1},
        {"note": ["a"]},
        {"more": 1},
    ],
)
def test_what_others_say_of_a_run_is_data(
    odd: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    told = asdict(cast("Any", now_of(finished)))
    (tmp_path / NOW[0]).write_text(json.dumps(told | odd))
    assert (now_of(tmp_path) is None) == (odd != {"more": 1})
    (tmp_path / NOW[0]).write_text("[" * 100_000)
    assert now_of(tmp_path) is None


@pytest.mark.parametrize("how", ["--quiet", "-q", "FUSELLM_QUIET"])
def test_quiet_leaves_out_all_but_results_and_errors(
    how: str, finished: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "evaluate")
    given = [how] if how.startswith("-") else []
    if not given:
        monkeypatch.setenv(how, "1")
    code, out, err = command("run", run, *given)
    assert code == 0
    assert (
        "evaluating" not in err
    )  # a library's own bars, which a command turns off, are shown here
    assert "bits per byte" in out
    code, _, err = command("status", tmp_path / "none", *given)
    assert code == 1
    assert "is not a run" in err
    monkeypatch.delenv("FUSELLM_QUIET", raising=False)
    shutil.rmtree(run / "evaluate")
    assert "evaluating" in command("run", run)[2]
