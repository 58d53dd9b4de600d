"""The documentation does what it says: every code block is run, or marked with what it needs.

tests/pages.py has the marks. All blocks of a page are run in order in a folder of the page's own,
which has `recipes`, `benchmarks` and `examples` as a clone has them; Python blocks with no shell
between them are one script. Worlds that a page may ask for by `<!-- setup: NAME -->`:

- `tiny-run`: a finished run `runs/demo` of `recipe.yaml` (target zoo/prose, sources python and cpp;
  its text in `data/`), and models of one family: the folders A, B, C, and BASE that they come from.
- `tiny-chat`: a recipe `chat.yaml` and its prompts, which the target answers to learn from.
"""

import email
import html
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command

import fusellm
from fusellm.cli.draw import SITUATIONS
from fusellm.cli.main import app
from fusellm.config.study import StudySettings
from fusellm.config.yaml_text import read_yaml
from fusellm.recipe_file import check_recipe
from pages import (
    LANGUAGES,
    MARKS,
    NEEDS,
    PAGES,
    ROOT,
    SHELLS,
    Block,
    blocks,
    commands,
    inline_commands,
    setup,
)

WORLDS = ("tiny-run", "tiny-chat")
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_PAGES = [page for page in PAGES if any(block.is_run for block in blocks(page))]
CHAT = """
name: chat
target: zoo/prose
sources: [{name: python, model: zoo/python}]
corpus:
  documents:
    - files: prompts.jsonl
      text_field: [question, answer]
      context_fields: [question]
      generated: {max_new_tokens: 8}
  block_bytes: 256
  validation_share: 0.1
  held_out_share: 0.2
training: {max_steps: 4, clm_baseline: false}
evaluation: {resamplings: 200}
"""
RECIPE = """
name: demo
target: zoo/prose
sources:
  - {name: python, model: zoo/python}
  - {name: cpp, model: zoo/cpp}
corpus:
  documents:
    - {files: data/python.jsonl, domain: python}
    - {files: data/cpp.jsonl, domain: cpp}
  block_bytes: 256
  train_bytes: 12_000
  validation_share: 0.1
  held_out_share: 0.2
objective: {lambda: 0.5}
training: {learning_rate: 1.0e-3, per_device_train_batch_size: 8, save_steps: 4, validations: 2}
evaluation: {resamplings: 200}
"""


# Every block


def test_every_block_is_run_or_says_what_it_needs() -> None:
    assert len(BLOCKS) > 100
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: what is {block.language!r}?"
        for name, value in block.marks:
            assert name in MARKS, f"{block}: the mark {name!r} is none of {MARKS}"
            if name == "needs":
                assert value in NEEDS, f"{block}: needs {value!r}, which is none of {list(NEEDS)}"
    for page in PAGES:
        found = setup(page)
        assert found is None or found[0] in WORLDS, f"{page}: no such setup: {found}"


def test_python_is_python() -> None:
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, str(block), "exec")


def merged(base: Any, more: Any) -> Any:
    if isinstance(base, dict) and isinstance(more, dict):
        return base | {key: merged(base.get(key), value) for key, value in more.items()}
    return more


def check_yaml(block: Block) -> None:
    """As a whole recipe or study, or merged into one."""
    raw = read_yaml(textwrap.dedent(block.text))
    kind, *place = (block.mark("fragment of") or "").split(".")
    for key in reversed(place):
        raw = {key: raw}
    if kind == "study" or "arms" in raw:
        arms = {"fused": {}, "clm": {"train": "clm"}}
        study = {"name": "whole", "recipe": "recipe.yaml", "arms": arms}
        StudySettings.model_validate(merged(study, raw) if kind else raw)
    else:
        base = yaml.safe_load(CHAT if kind == "chat" else RECIPE)
        check_recipe(merged(base, raw) if kind else raw, str(block))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    check_yaml(block)


def fault_of(words: list[str]) -> str | None:
    """What fusellm would say of how a command is spelled; None if nothing."""
    starts = [n for n, word in enumerate(words) if word.removeprefix(".venv/bin/") == "fusellm"]
    if not starts or (starts[0] > 0 and words[starts[0] - 1] != "-m"):
        return None
    given = [word for word in words[starts[0] + 1 :] if word not in ("--debug", "--quiet")]
    command, path = get_command(app), "fusellm"
    while hasattr(command, "commands") and given and not given[0].startswith("-"):
        if given[0] in ("COMMAND", "…"):
            return None
        if given[0] not in command.commands:
            return f"{path} has no command {given[0]!r}"
        path = f"{path} {given[0]}"
        command, given = command.commands[given[0]], given[1:]
    context = command.make_context(path, [], resilient_parsing=True)
    context.resilient_parsing = False
    try:
        command.make_parser(context).parse_args(given)
    except Exception as error:
        return f"{path}: {error}"
    return None


def test_a_wrong_command_is_found() -> None:
    assert fault_of(["fusellm", "run", "x.yaml", "--set", "a=b"]) is None
    assert fault_of(["accelerate", "launch", "-m", "fusellm", "train", "runs/x"]) is None
    assert "no command 'fly'" in str(fault_of(["fusellm", "fly"]))
    assert "--fast" in str(fault_of(["fusellm", "run", "x.yaml", "--fast"]))
    assert "no command 'eat'" in str(fault_of(["fusellm", "store", "eat"]))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page: str) -> None:
    """In blocks, those that are not run too, and in sentences."""
    found = [
        (str(block), words)
        for block in blocks(page)
        if block.language in SHELLS
        for words in commands(block.shell)
    ]
    if page != "CHANGELOG.md" and not page.startswith("docs/log"):  # of former times
        found += [(page, words) for words in inline_commands(page)]
    for where, words in found:
        assert (fault := fault_of(words)) is None, f"{where}: {' '.join(words)}: {fault}"
        for word in words:
            if re.fullmatch(r"(benchmarks|examples|recipes)/[\w/-]+\.(py|yaml)", word):
                assert (ROOT / word).is_file(), f"{where}: there is no {word}"


def test_the_drawn_boundaries_are_those_of_the_tokenizers() -> None:
    drawing = (ROOT / "docs/pictures/boundaries.svg").read_text("utf-8")
    drawn = re.findall(r'data-source="(\w+)" data-signs="([^"]+)"', drawing)
    assert len(drawn) == 2
    load = fusellm.Tokenizer.from_pretrained
    for source, signs in drawn:
        found = fusellm.align(load(f"zoo/{source}"), load("zoo/prose"), "a.__len\n\n  def title()")
        inside = [row.situation for row in found][1:-1]  # not at the text's beginning and end
        assert html.unescape(signs) == "".join(SITUATIONS[one].sign for one in inside)


# They are run


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As in a shell with the environment of this Python, with no hub."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "FUSELLM_CACHE": str(tmp_path_factory.mktemp("cache")),
        "FUSELLM_QUIET": "1",
    }


def ran(script: list[str], where: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a script in a folder; what it wrote is shown if it fails."""
    done = subprocess.run(
        script, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{script[-1]}\n{said}"


def write_texts(folder: Path) -> None:
    """Files of the standard library and headers of numpy, in small pieces, as records."""
    folder.mkdir()
    sources = {
        "python": sorted(Path(email.__file__).parent.glob("*.py")),
        "cpp": sorted(Path(np.get_include()).rglob("*.h")),
    }
    for domain, paths in sources.items():
        texts = [path.read_text("utf-8") for path in paths]
        pieces = [text[at : at + 500] for text in texts for at in (0, 500, 1000)]
        lines = [json.dumps({"text": piece}) + "\n" for piece in pieces if len(piece) > 100]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("tiny-run")
    write_texts(folder / "data")
    (folder / "recipe.yaml").write_text(RECIPE.lstrip(), encoding="utf-8")
    ran(["fusellm", "run", "recipe.yaml"], "the world tiny-run", folder, environment)
    trained = folder / "runs/demo/train"
    for name, model in {"A": "clm", "B": "fused", "C": "clm"}.items():
        shutil.copytree(trained / model, folder / name)
    shutil.copytree(ROOT / "src/fusellm/zoo/weights/prose", folder / "BASE")
    return folder


@pytest.fixture
def folder(
    page: str, tmp_path: Path, request: pytest.FixtureRequest, environment: dict[str, str]
) -> Iterator[Path]:
    """The folder of a page, with what it asks for."""
    wanted, names = setup(page) or ("nothing", [])
    if wanted == "tiny-run":
        tiny = request.getfixturevalue("tiny_run")
        shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
        for name in names:
            shutil.copytree(tiny / "runs/demo", tmp_path / "runs" / name)
    if wanted == "tiny-chat":
        (tmp_path / "chat.yaml").write_text(CHAT.lstrip(), encoding="utf-8")
        rows = [{"question": f"What is {n}?\n", "answer": f"It is {n}."} for n in range(60)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    for name in ("recipes", "benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """The scripts of a page, each with where it stands; Python that follows Python is one."""
    script, where = "", ""
    for block in blocks(page):
        if block.language == "python" and block.is_run and not block.mark("prepare"):
            where = where or str(block)
            script += block.text + "\n"
            continue
        if script and (block.is_run or block.mark("file")):
            yield where, [sys.executable, "-c", script]
            script = where = ""
        if (command := block.mark("prepare")) is not None:
            yield f"{block} (prepare)", ["bash", "-euo", "pipefail", "-c", command]
        if (file := block.mark("file")) is not None:
            yield str(block), [sys.executable, "-c", f"open({file!r}, 'w').write({block.text!r})"]
        elif block.language == "python" and block.is_run:
            where, script = str(block), block.text + "\n"
        elif block.is_run:
            yield str(block), ["bash", "-euo", "pipefail", "-c", block.shell]
    if script:
        yield where, [sys.executable, "-c", script]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN_PAGES)
def test_a_page_runs(page: str, folder: Path, environment: dict[str, str]) -> None:
    for where, script in steps(page):
        ran(script, where, folder, environment)


# The site


class Fetched(HTMLParser):
    """What a browser fetches to show a page: not what its links lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("next", "prev", "index", "search", "author"):
            self.addresses.append(given.get("href") or "")
        if tag not in ("a", "link"):
            self.addresses += [given.get(key) or "" for key in ("src", "srcset", "data", "poster")]


@pytest.mark.slow
def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="needs fusellm[docs]")
    command = ["-m", "sphinx", "-W", "--keep-going", "-n", "-E", "-q", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [sys.executable, *command, ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        found = Fetched()
        found.feed(path.read_text("utf-8"))
        outside = [one for one in found.addresses if re.match(r"(\w+:)?//", one)]
        assert outside == [], path
    for path in (tmp_path / "site").rglob("*.css"):
        fetched = r"(?:url\(|@import\s+)['\"]?((?:https?:)?//[^'\")]+)"
        found_in = re.findall(fetched, path.read_text("utf-8"))
        assert found_in == [], path
    commands_page = (tmp_path / "site/cli.html").read_text("utf-8")
    names_page = (tmp_path / "site/python-names.html").read_text("utf-8")
    assert "--ray-address" in commands_page
    assert 'id="fusellm.fusion_loss"' in names_page
