"""`fusellm store`: info, verify and cat, as a person and as a program meet them."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusellm.cli.console import STDERR, Terminal
from fusellm.cli.main import main
from fusellm.errors import ModelError
from fusellm.models import readers
from fusellm.models.readers import load_encoder
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.identity import Identity, digest, tokenizer_fingerprint
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.opened import open_store
from stores import IDENTITY, Made, flip, kept_of_rows, middle_of, some, write_store


@pytest.fixture(params=[True, False], ids=["sampled", "top"])
def made_store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of two shards, of 100 and 30 blocks."""
    sampled = bool(request.param)
    write_store(tmp_path / "made", [some(100, sampled, 1), some(30, sampled, 2)], sampled)
    return tmp_path / "made"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fusellm", "store", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with `top` distributions."""
    run_ = tmp_path_factory.mktemp("stores") / "tiny"
    changes = ["externalize.scheme=top", "externalize.k=10"]
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", changes), world)
    Pipeline(recipe, run_, Silent()).execute(["corpus", "externalize"])
    return run_


def test_info(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    path = finished / "externalize" / "second"
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "info", str(path)) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    store = open_store(path)
    for part in ("GPTNeoXForCausalLM", store.facts.weights_sha256[:12], "10 most probable"):
        assert part in shown
    assert run(monkeypatch, "info", str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == len(store)
    assert found["identity"]["stage"] == "externalize/second"
    assert found["fault"] is None
    assert sum(found["bytes_per_token"].values()) == pytest.approx(
        found["bytes"] / found["tokens"], rel=0.15
    )
    weights = store.facts.weights_sha256
    file = (Path(store.facts.model) / "model.safetensors").read_bytes()
    assert weights == digest({"model.safetensors": hashlib.sha256(file).hexdigest()})


def test_info_of_a_store_that_is_unfinished_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = tmp_path / "s"
    write_store(path, [some(70, True), None, some(70, True)], sampled=True, finish=False)
    assert run(monkeypatch, "info", str(path)) == 0
    shown = capsys.readouterr().out
    assert "unfinished" in shown
    assert "140, 0 to 69, 270 to 339" in shown
    assert "put aside, 16: its tokenizer changes the text" in shown
    assert "\x1b" not in shown
    flip(path / "train-00000.arrow", middle_of(StageFolder(path), "train-00000.arrow", 2))
    assert run(monkeypatch, "info", str(path)) == 0
    assert "train-00000.arrow is damaged" in capsys.readouterr().out
    (path / "train-00000.arrow").unlink()
    assert run(monkeypatch, "info", str(path), "--json") == 0
    assert "1 of 2 shards are missing" in json.loads(capsys.readouterr().out)["fault"]


def test_verify_and_repair(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    assert run(monkeypatch, "verify", str(place)) == 0
    captured = capsys.readouterr()
    assert "All 27 files are what was written." in captured.out
    assert "MB" in captured.err
    source = place / "externalize" / "first"
    flip(source / "train-00001.arrow", 3000)
    flip(place / "externalize" / "target" / MANIFEST, 100)
    assert run(monkeypatch, "verify", str(place), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["whole"], found["faults"]) == (False, 2)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    (fault,) = stages["externalize/first"]["faults"]
    assert (fault["file"], fault["record_batches"]) == ("train-00001.arrow", [0])
    assert not stages["externalize/target"]["faults"][0]["repairable"]
    assert run(monkeypatch, "verify", str(source)) == 1
    shown = capsys.readouterr().out
    assert f"{source}/train-00001.arrow  damaged: record batch 0" in shown
    assert f"fusellm store verify {source} --repair" in shown
    assert run(monkeypatch, "verify", str(place), "--repair") == 1
    shown = capsys.readouterr().out
    assert "externalize/first: 1 file taken out. This makes it anew, and no others:" in shown
    assert f"fusellm externalize {place}" in shown
    assert "A manifest cannot be repaired" in shown
    assert run(monkeypatch, "verify", str(source)) == 0
    assert "whole so far, unfinished" in capsys.readouterr().out
    (place / "externalize" / "target" / MANIFEST).unlink()
    assert run(monkeypatch, "verify", str(place / "externalize")) == 1
    assert "manifest.json  missing" in capsys.readouterr().out
    assert run(monkeypatch, "verify", str(tmp_path / "none")) == 1
    assert "is not there; give the folder of a run" in capsys.readouterr().err


def _nowhere(*_: Any) -> None:
    raise ModelError("it is not here")


def test_cat_lists_positions(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = finished / "externalize" / "second"
    block = open_store(path)[7]
    for width in ("80", "120"):
        monkeypatch.setenv("COLUMNS", width)
        assert run(monkeypatch, "cat", str(path), "--block", "7", "--limit", "5") == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= int(width)
        assert f"block 7  {len(block.ids)} tokens, {block.positions} positions" in shown
        assert f"{block.positions - 5} more positions" in shown
        assert sum(line.strip()[:1].isdigit() for line in shown.splitlines()) == 6
    assert run(monkeypatch, "cat", str(path), "--block", "7", "--position", "3") == 0
    shown = capsys.readouterr().out
    assert all(str(id_) in shown for id_ in block.at(3).ids)
    assert "not kept" in shown
    moved = tmp_path / "inner" / "moved"
    shutil.copytree(path, moved)
    (moved.parents[1] / "recipe.yaml").write_text("not: [a recipe")  # of whoever: it is not read
    assert run(monkeypatch, "cat", str(moved)) == 0  # the store names its model
    model = open_store(path).facts.model  # whose folder's name has a number by chance
    assert str(open_store(path)[0].ids[1]) not in capsys.readouterr().out.replace(model, "")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "locate", _nowhere)
        assert run(monkeypatch, "cat", str(moved)) == 0
    captured = capsys.readouterr()
    assert str(open_store(path)[0].ids[1]) in captured.out
    assert "ids are shown, and with --tokenizer NAME tokens: it is not here" in captured.err
    assert run(monkeypatch, "cat", str(moved), "--block", "7", "--tokenizer", model) == 0
    assert "·" in capsys.readouterr().out
    other = open_store(finished / "externalize" / "first").facts.model
    assert run(monkeypatch, "cat", str(moved), "--tokenizer", other) == 1
    assert "is not the one that" in capsys.readouterr().err
    assert run(monkeypatch, "cat", str(path), "--block", "999") == 1
    assert "there is no block 999" in capsys.readouterr().err
    assert run(monkeypatch, "cat", str(path), "--position", "999") == 1
    assert "there is no position 999: block 0 has" in capsys.readouterr().err
    assert run(monkeypatch, "cat", str(finished / "corpus")) == 1
    assert "holds a run's corpus" in capsys.readouterr().err


def test_cat_as_json_is_the_store(
    made_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run(monkeypatch, "cat", str(made_store), "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, block in zip(lines, open_store(made_store), strict=True):
        assert (line["block"], line["usable"]) == (block.number, block.usable)
        assert (line["ids"], line["ends"]) == (block.ids.tolist(), block.ends.tolist())
        assert len(line["positions"]) == block.positions
        for n, row in enumerate(line["positions"]):
            at = block.at(n)
            assert (row["ids"], row["true_id"]) == (at.ids.tolist(), at.true_id)
            assert row.get("counts", []) == at.counts.tolist()
            np.testing.assert_allclose(row["log_probs"], at.log_probs, atol=1e-6)
            assert row["tail"] == pytest.approx(at.tail, rel=1e-6)
    some_block = next(block for block in open_store(made_store) if block.positions > 1)
    one = ("--block", str(some_block.number), "--limit", "1")
    assert run(monkeypatch, "cat", str(made_store), "--json", *one) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["positions"]) == 1


def test_nothing_of_a_store_reaches_the_terminal_unescaped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A model's name, a document's, and tokens that are control characters."""
    neox = str(world / "neox")
    encoder = load_encoder(neox, False, Terminal(STDERR))
    vocabulary = encoder.vocabulary.token_bytes
    escape, bell = vocabulary.index(b"\x1b"), vocabulary.index(b"\x07")
    kept = kept_of_rows(
        [
            {"ids": [bell, escape], "log_probs": [-0.7, -1.5], "counts": [], "tail": 0.28}
            | {"true": -1.5}
        ]
    )
    made = Made([(True, [escape, bell], [1, 2]), (False, [escape], [])], kept)
    evil = "evil\x1b]0;title\x07[red]"
    fingerprint = tokenizer_fingerprint(encoder)
    identity = Identity("externalize/made", {}, {**IDENTITY.inputs, "tokenizer": fingerprint})
    path = tmp_path / "evil"
    names = {"model": evil, "device": evil, "architecture": evil}
    write_store(path, [made], False, vocabulary=400, identity=identity, **names)
    known = ("--tokenizer", neox)
    for arguments in (
        ("info", str(path)),
        ("info", str(path), "--json"),
        ("cat", str(path), *known),
        ("cat", str(path), "--position", "0", *known),
        ("cat", str(path), "--block", "1", *known),
        ("cat", str(path), "--json", *known),
        ("verify", str(path)),
    ):
        assert run(monkeypatch, *arguments) == 0, arguments
        shown = capsys.readouterr().out
        assert not set(shown) & {"\x1b", "\x07"}, arguments
        if arguments[0] == "cat":
            assert "\\x1b" in shown or "\\u001b" in shown
        if arguments == ("info", str(path)):
            assert "[red]" in shown


@pytest.mark.parametrize("command", [(), ("info",), ("verify",), ("cat",)])
def test_help_teaches(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 8
    assert "Example" in shown or not command


def test_what_has_been_read_is_cut_at_tokens_and_by_columns() -> None:
    from rich.cells import cell_len

    from fusellm.cli.store import _until

    wide = _until(["漢字"] * 100, "")
    assert cell_len(wide) <= 61
    assert wide == "…" + "漢字" * 15
    assert _until(["a", "b"], " ") == "a b"
