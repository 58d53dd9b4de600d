"""What is told of tokenizers and text before a model is loaded, and beside the results."""

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Told, prose
from fusellm import preflight
from fusellm.cli.main import main
from fusellm.config import CorpusSettings
from fusellm.corpus.look import EntryFacts
from fusellm.corpus.sample import first_blocks
from fusellm.errors import CorpusError, ModelError, StoreError, TokenizerError
from fusellm.evaluation.results import require_savable
from fusellm.models import load
from fusellm.pipeline import Pipeline
from fusellm.preflight import projected_store_bytes
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.run import Run
from fusellm.store.externalized import open_externalized
from fusellm.tokens.sample import sample
from worlds import normalizing

QUICK = ("training.max_steps=1", "training.validations=0", "training.clm_baseline=false")


def pipeline(world: Path, run: Path, *changes: str, progress: Silent | None = None) -> Pipeline:
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, progress or Silent())


def command(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    patch.setattr(sys, "argv", ["fusellm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def lower(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer writes all text small."""
    folder = tmp_path_factory.mktemp("lower") / "lower"
    shutil.copytree(world / "neox", folder)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which a third has a capital letter: 0, 3, 6 and so on."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = ({"text": ("A " if n % 3 == 0 else "a ") + prose(n, 40).lower()} for n in range(90))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def of(lower: Path, texts: Path) -> tuple[str, ...]:
    documents = f"corpus.documents=[{{files: {texts}, domain: mixed}}]"
    return (documents, f"sources.1.model={lower}", *QUICK)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", refuse)


def test_a_sample_says_what_a_tokenizer_changes() -> None:
    encoder, texts = normalizing("lower"), ["small", "Large", "small"]
    found = sample(encoder.encode(texts), texts)
    assert (found.blocks, found.changed, found.example) == (3, 1, "Large")
    assert found.changed_share == pytest.approx(1 / 3)
    assert sample([], []).changed_share == 0


def test_a_sample_of_a_corpus_is_of_every_entry(world: Path) -> None:
    recipe = resolve_paths(load_recipe(world / "recipe.yaml"), world)
    blocks = first_blocks(recipe.corpus)
    assert 64 < len(blocks) <= 128
    assert max(len(block.text.encode()) for block in blocks) <= recipe.corpus.block_bytes
    assert any("= " in block.text for block in blocks)
    builtin = CorpusSettings.model_validate({"documents": [{"builtin": "python"}]})
    assert len(first_blocks(builtin)) == 64
    hub = CorpusSettings.model_validate({"documents": [{"hub": "owner/name", "streaming": False}]})
    assert first_blocks(hub) == []


def test_check_stops_at_a_tokenizer_that_changes_too_much(
    world: Path,
    lower: Path,
    texts: Path,
    unloaded: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = [part for change in of(lower, texts) for part in ("--set", change)]
    check = ("check", world / "recipe.yaml", *sets, "--out", tmp_path / "run")
    assert command(monkeypatch, *check, "--set", "externalize.changed_share=0.1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the tokenizer of 'second' changes " in line
    assert "more than externalize.changed_share: 0.1 allows" in line
    assert command(monkeypatch, *check, "--json") == 0
    found = json.loads(capsys.readouterr().out)["models"]
    tried = found["second"]["blocks_tried"]
    assert tried == found["first"]["blocks_tried"] == 64
    assert 0.2 < found["second"]["blocks_changed"] / tried < 0.45
    assert found["first"]["blocks_changed"] == 0
    assert (found["first"]["put_before"], found["second"]["put_before"]) == (["<s>"], [])
    assert command(monkeypatch, *check) == 0
    shown = capsys.readouterr().out
    assert f"second: reads {tried - found['second']['blocks_changed']} of {tried} blocks" in shown
    longest = found["first"]["longest_tried"]
    assert 0 < longest <= found["first"]["context_tokens"]
    told = f"blocks that were tried, the longest of {longest} tokens; puts <s> before each"
    assert f"first: reads {tried} of {tried} {told}" in shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", ""),
        ("empty.jsonl", ""),
        ("blank.txt", " \n\t\n"),
        ("blank.jsonl", '{"text": ""}\n' * 3 + '{"text": null}\n{"text": " "}\n'),
    ],
)
def test_check_refuses_a_corpus_without_text_as_a_run_does(
    world: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    documents = f"corpus.documents=[{{files: {tmp_path / name}, domain: mine}}]"
    one = pipeline(world, tmp_path / "run", documents, *QUICK)
    message = r"has no text: all its documents \(mine\) are empty; check their paths and text_field"
    with pytest.raises(CorpusError, match=message):
        one.check()
    with pytest.raises(CorpusError, match="has no text in its part train"):
        one.execute(["corpus"])


def test_an_entry_without_text_beside_others_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full.txt").write_text("some text\n")
    documents = [{"files": f"{tmp_path}/{name}.txt"} for name in ("empty", "full")]
    (block,) = first_blocks(CorpusSettings.model_validate({"documents": documents}))
    assert block.text == "some text\n"


def test_check_refuses_a_block_that_it_tried_and_that_does_not_fit(
    world: Path, unloaded: None, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("".join(prose(n, 60) for n in range(200)), "utf-8")
    documents = f"corpus.documents=[{{files: {tmp_path}/long.txt, domain: mine}}]"
    one = pipeline(world, tmp_path / "run", documents, "corpus.block_bytes=100000", *QUICK)
    message = r"the longest block that was tried has \d+ tokens for 'target', whose context is \d+"
    with pytest.raises(CorpusError, match=message + r"; lower corpus.block_bytes \(now 100000\)"):
        one.check()


def test_a_run_stops_before_any_model_is_loaded(
    world: Path, lower: Path, texts: Path, unloaded: None, tmp_path: Path
) -> None:
    changes = (*of(lower, texts), "externalize.changed_share=0.1")
    with pytest.raises(TokenizerError, match=r"'second' changes \d+ of \d+ blocks that were tried"):
        pipeline(world, tmp_path, *changes).execute()
    assert not (tmp_path / "externalize").exists()


def test_blocks_that_the_sample_has_missed_are_counted_as_they_are_read(
    world: Path, lower: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "try_tokenizers", lambda *_: {})
    changes = (*of(lower, texts), "externalize.changed_share=0.1")
    message = r"source 'second' changes \d+ of \d+ blocks \(the first is block \d+, document"
    with pytest.raises(TokenizerError, match=message):
        pipeline(world, tmp_path, *changes).execute(["corpus", "externalize"])


def test_what_is_left_out_is_said_and_stands_beside_the_results(
    world: Path,
    lower: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, told = tmp_path / "run", Told()
    pipeline(world, run, *of(lower, texts), progress=told).execute()
    folder = open_externalized(run, "second")
    changed, blocks = folder.counts["walk_failed"], folder.counts["blocks"]
    said = f"second: {changed} of {blocks} blocks are left out, because its tokenizer changes"
    assert [line for line in told.lines if line.startswith(said)]
    assert not [line for line in told.lines if line.startswith("first: ")]
    notes = json.loads((run / "evaluate" / "results.json").read_text())["notes"]
    left_out = notes["blocks_left_out"]
    assert 0 < left_out < notes["blocks"]
    assert notes["blocks_changed"] == {"second": left_out}
    sentence = (
        f"Compared on {notes['blocks'] - left_out} of {notes['blocks']} held-out blocks; blocks "
        f"that a model cannot read: second {left_out}."
    )
    table = tmp_path / "table.md"
    assert command(monkeypatch, "evaluate", run, "--suite", "lm", "--save", table) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert f"- {sentence}\n" in table.read_text()
    assert sentence in (run / "report" / "index.html").read_text()


def test_models_that_no_held_out_block_is_left_for_are_told_before_they_are_read(
    world: Path, lower: Path, texts: Path, unloaded: None, tmp_path: Path
) -> None:
    loud = tmp_path / "loud.jsonl"
    rows = ({"text": prose(n, 40).upper()} for n in range(30))
    loud.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    documents = f"[{{files: {texts}, domain: mixed}}, {{files: {loud}, domain: loud}}]"
    changes = (f"corpus.documents={documents}", *of(lower, texts)[1:])
    with pytest.raises(CorpusError, match=r"no held-out .* 'loud' .*second can read none"):
        pipeline(world, tmp_path / "run", *changes, "externalize.changed_share=0.9").execute()


def test_every_models_files_are_looked_at(
    world: Path, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By `check`, and by `run` before the corpus is cut."""
    folder = tmp_path / "cut"
    shutil.copytree(world / "neox", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    changes = (f"target.model={folder}", f"sources.1.model={folder}")
    recipe, run = world / "recipe.yaml", tmp_path / "run"
    sets = [part for change in changes for part in ("--set", change)]
    for name in ("check", "run"):
        assert command(monkeypatch, name, recipe, *sets, "--out", run) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.count("is no whole safetensors file") == 1
    assert not run.exists()
    with pytest.raises(ModelError, match="no whole safetensors file"):
        pipeline(world, run, *changes).check()


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run", "/dev/null", "locked/run"])
def test_a_run_that_cannot_be_written_is_told_before_anything_is_read(
    world: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "locked").mkdir()
    if "locked" in place:  # root writes whatever the mode says
        refused = OSError(errno.EROFS, "Read-only file system")

        def refuse(folder: Path, size: int) -> None:
            raise refused

        monkeypatch.setattr("fusellm.store.files._try_to_write", refuse)
    recipe = resolve_paths(load_recipe(world / "recipe.yaml"), world)
    run = tmp_path / place
    for act in (Pipeline.check, Pipeline.execute):
        with pytest.raises(StoreError, match=r"can be no folder|cannot be written to: .*, or give"):
            act(Pipeline(recipe, run, Silent()))
    assert (tmp_path / "file").read_text() == "text"
    assert not list((tmp_path / "locked").iterdir())


def test_files_say_what_their_distributions_take_where_there_is_no_budget(
    world: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(world / "recipe.yaml", ["corpus.train_bytes=null"])
    size = 3_500_000
    plain = EntryFacts("mine", {"jsonl": 2, "text": 1}, size, None)
    expected = load_recipe(world / "recipe.yaml", [f"corpus.train_bytes={size}"])
    assert projected_store_bytes(recipe, [plain]) == projected_store_bytes(expected, []) > size
    for kinds in ({"jsonl (gzip)": 1}, {"text": 1, "parquet": 1}, {}):
        assert projected_store_bytes(recipe, [plain, EntryFacts("a", kinds, size, None)]) is None


def test_models_of_one_folder_are_told_apart_on_a_narrow_screen(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models-that-lie-in-a-folder-of-a-long-name"
    shutil.copytree(world / "neox", folder / "neox-one")
    shutil.copytree(world / "neox", folder / "neox-two")
    names = ("neox-one", "neox-two")
    changes = [f"sources.{n}.model={folder / name}" for n, name in enumerate(names)]
    changes.append("corpus.train_bytes=null")
    changes.append("corpus.documents=[{builtin: prose}]")
    sets = [part for change in changes for part in ("--set", change)]
    monkeypatch.setenv("COLUMNS", "80")
    out = ("--out", tmp_path / "run")
    assert command(monkeypatch, "check", world / "recipe.yaml", *out, *sets) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    lines = shown.splitlines()
    header = next(line for line in lines if "architecture" in line)
    column = slice(header.index("model"), header.index("architecture"))
    joined = "".join(line[column].strip() for line in lines)
    assert all(str(folder / name) in joined for name in names)
    assert "Distributions on disk: not known, as corpus.train_bytes is not set; free: " in shown


def test_a_disk_that_is_too_small_is_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, much = world / "recipe.yaml", "corpus.train_bytes=99_000_000_000_000"
    out = ("--out", tmp_path / "run")
    assert command(monkeypatch, "check", recipe, *out, "--set", much) == 1
    captured = capsys.readouterr()
    assert "Distributions on disk: about" in captured.out
    assert "the run needs about" in captured.err
    run = Run(resolve_paths(load_recipe(recipe, [much]), world), tmp_path / "run")
    with pytest.raises(StoreError, match=r"the run needs about .* GB free; give another --out"):
        run.check()


def test_results_that_could_not_be_saved_are_told_before_any_are_made(tmp_path: Path) -> None:
    for place, what in (("/proc/x.md", "cannot be written to"), (f"{tmp_path}", "no name for a")):
        with pytest.raises(StoreError, match=what):
            require_savable([Path(place)])
    (tmp_path / "x.md").mkdir()
    with pytest.raises(StoreError, match="is a folder; name a file"):
        require_savable([tmp_path / "x.md"])
    require_savable([tmp_path / "y.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.md"]
