"""Every fault that was found by trying it: the command that is typed, before and after.

One test a row of the list of faults, or several where the row has several. *Before* is what
commit 81864a1 did, in words, or 4f166d0 where it was found later; *after* is asserted. Each row's
own example is there, and one at least of the same kind that nobody had reported. Thorough tests
are elsewhere; these are short.

    python tests/test_found_by_trying.py     # the table: row, command, before, after
"""

import bz2
import errno
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import normalizers
from transformers import AutoTokenizer

import worlds
from conftest import prose
from fusellm.cli.main import main
from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox import Limits, find_sandbox
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import open_corpus, read_part
from fusellm.zoo.text import Document, drop_near_duplicates
from stores import Columns, flip, rewrite_columns

PATIENCE_SECONDS = 200
SHARD = "train-00000.arrow"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3712000\n"
ESCAPE = "\x1b[31m[/bold][red]\u202e"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        fault: of the list, such as "A1".
        command: as it is typed, with short paths.
        before: what it did, in words.
        after: what it says now, or does.
    """

    fault: str
    command: str
    before: str
    after: str


ROWS: list[Row] = []


class Tried:
    """What tries commands in this process, and remembers them for the table."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        captured: pytest.CaptureFixture[str],
        short: dict[str, str],
    ) -> None:
        self._patch, self._captured, self._short = patch, captured, short

    def __call__(
        self, fault: str, before: str, *command: object, code: int = 0, says: Iterable[str] = ()
    ) -> str:
        """Type a command; check its exit code and that it says all of `says`.

        Returns:
            All that it wrote, with single spaces.
        """
        self._patch.setattr(sys, "argv", ["fusellm", *map(str, command)])
        self._captured.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        found = self._captured.readouterr()
        told = " ".join((found.out + found.err).split())
        assert int(stop.value.code or 0) == code, told
        assert [part for part in says if part not in told] == [], told
        assert "Traceback" not in told
        if code == 1 and "verify" not in command:  # one line, and the last
            assert found.err.splitlines()[-1].startswith("fusellm: ")
        typed = " ".join(f"'{word}'" if " " in word else word for word in map(str, command))
        self.note(
            fault,
            f"fusellm {typed}",
            before,
            "; ".join(says) or ("is refused" if code else "is done"),
        )
        return told

    def note(self, fault: str, command: str, before: str, after: str) -> None:
        """A line of the table."""
        for long, short in self._short.items():
            command, after = command.replace(long, short), after.replace(long, short)
        ROWS.append(Row(fault, command, before, after))


@pytest.fixture
def tried(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: Path,
    tmp_path: Path,
) -> Tried:
    monkeypatch.setenv("COLUMNS", "400")  # a table folds what is long
    monkeypatch.chdir(tmp_path)  # where runs/ comes to be
    return Tried(monkeypatch, capsys, {f"{world}/": "", f"{tmp_path}/": "", str(tmp_path): "."})


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Shows what was tried, when all has been."""
    yield
    shown = Table("", "command", "before", "after", box=box.SIMPLE_HEAD)
    for row in sorted(ROWS, key=lambda row: (row.fault[0], int(row.fault[1:] or 0))):
        shown.add_row(*(Text(part) for part in (row.fault, row.command, row.before, row.after)))
    Console(width=180).print(shown)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done."""
    run = tmp_path_factory.mktemp("tried") / "run"
    changes = ["training.max_steps=2", "training.validations=0"]
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", changes), world)
    Pipeline(recipe, run, Silent()).execute()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The same, to do something to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def recipe(world: Path) -> Path:
    return world / "recipe.yaml"


def model_of(world: Path, folder: Path, base: str = "neox", **config: object) -> Path:
    """A copy of a model, with other keys in its config.json."""
    shutil.copytree(world / base, folder)
    if config:
        edit(folder / "config.json", lambda found: found.update(config))
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a file of JSON holds."""
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def configured(**keys: object) -> Callable[[Path], object]:
    """A change of a model: other keys in its config.json."""
    return lambda model: edit(model / "config.json", lambda found: found.update(keys))


def holding(name: str, text: str) -> Callable[[Path], object]:
    """A change of a model: a file holds this."""
    return lambda model: (model / name).write_text(text)


def jsonl(path: Path, texts: Iterable[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def files(*names: object, **keys: object) -> list[str]:
    """Another corpus."""
    entry = {"files": [str(name) for name in names], "domain": "mine"} | keys
    return sets(f"corpus.documents={json.dumps([entry])}")


def source(model: object) -> list[str]:
    return sets(f"sources.1.model={model}")


# A. Silent and wrong


def test_a1_packed_and_unknown_files(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    texts = [prose(n) for n in range(40)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "gz").mkdir()
    for n in range(0, len(rows), 5):
        path = tmp_path / "gz" / f"{n:02}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(rows[n : n + 5]).encode()))
    (tmp_path / "all.jsonl.BZ2").write_bytes(bz2.compress("".join(rows).encode()))
    before = "read as plain text: a model trained on U+FFFD"
    for name in ("gz/*.gz", "all.jsonl.BZ2"):
        out = tmp_path / f"run{name[:2]}"
        tried("A1", before, "corpus", recipe, "--out", out, *files(tmp_path / name))
        read = [
            block.text
            for part in ("train", "held_out")
            for block in read_part(open_corpus(out), part)
        ]
        assert read
        assert all(any(text in whole for whole in texts) for text in read)
    command = ("corpus", recipe, "--out", tmp_path / "other")
    for name, data, part in (
        ("x.dat", b"words " * 99, "the ending .dat is not known"),
        ("x.tar.gz", gzip.compress(b"words " * 99), "the ending .tar is not known"),
        ("packed.jsonl", gzip.compress("".join(rows).encode()), "is no text in UTF-8"),
        ("utf16.txt", "words ".encode("utf-16") * 99, "convert it (iconv -t UTF-8)"),
    ):
        (tmp_path / name).write_bytes(data)
        tried("A1", before, *command, *files(tmp_path / name), code=1, says=[part])


def test_a1_what_is_lost_is_told(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    before = "a counter in a manifest"
    latin = "\n".join(prose(n) for n in range(9)).encode("latin-1", "replace") + "é".encode(
        "latin-1"
    )
    (tmp_path / "latin.txt").write_bytes(latin)
    halves = tmp_path / "halves.jsonl"
    halves.write_text("".join(f'{{"text": "half \\ud800 of {n}"}}\n' for n in range(60)))
    empty = jsonl(tmp_path / "empty.jsonl", [None, "", *(prose(n) for n in range(30))])
    for path, part in (
        (tmp_path / "latin.txt", "bytes that are no UTF-8, read as \ufffd"),
        (halves, "halves of characters in JSON as ?): 60; the first is halves.jsonl:0"),
        (empty, "documents without any text, left out: 2"),
    ):
        out = tmp_path / path.stem
        tried("A1", before, "corpus", recipe, "--out", out, *files(path), says=[part])


def test_a2_a_tokenizer_that_changes_text(
    tried: Tried, recipe: Path, world: Path, tmp_path: Path
) -> None:
    texts = jsonl(tmp_path / "big.jsonl", [prose(n).upper() + "café" for n in range(40)])
    before = "ran on, on what was left; or stopped after both trainings"
    for name, normalizer, out in (
        ("lower", normalizers.Lowercase(), tmp_path / "lower-run"),
        (
            "stripping",
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
            tmp_path / "s",
        ),
    ):
        folder = model_of(world, tmp_path / name)
        backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        backend.normalizer = normalizer
        backend.save(str(folder / "tokenizer.json"))
        given = (recipe, "--out", out, *source(folder), *files(texts))
        part = "the tokenizer of 'second' changes"
        tried("A2", before, "check", *given, code=1, says=[part, "or raise that share"])
    last = sets("externalize.changed_share=1")
    says = ["no held-out block of domain 'mine' can be read by all"]
    tried(
        "A2",
        before,
        "run",
        *given[:3],
        *source(tmp_path / "lower"),
        *files(texts),
        *last,
        code=1,
        says=says,
    )
    assert not (given[2] / "externalize" / "second").exists()


def test_a2_what_was_compared_stands_beside_the_table(tried: Tried, run: Path) -> None:
    tried("A2", "not said", "evaluate", run, says=["Compared on", "held-out blocks."])


def test_a3_what_a_tokenizer_puts_before_a_text(
    tried: Tried, recipe: Path, world: Path, tmp_path: Path
) -> None:
    folder, odd = (model_of(world, tmp_path / name) for name in ("glm", "odd"))
    base = AutoTokenizer.from_pretrained(folder)
    worlds.putting(base, ["<|endoftext|>", "<|endoftext|>"]).save_pretrained(folder)
    worlds.putting(base, ["<|endoftext|>"], ["<|endoftext|>"]).save_pretrained(odd)
    two, one = "<|endoftext|> <|endoftext|>", "<|endoftext|>"
    before = "“BOS before each block: none”, and none was put"
    tried("A3", before, "tokenizers", folder, world / "neox", says=["put before each block", two])
    given = ("check", recipe, "--out", tmp_path / "run")
    tried("A3", before, *given, *source(folder), says=[f"puts {two} before each"])
    tried(
        "A3", before, *given, *source(odd), says=[f"puts {one} before each"]
    )  # not what comes after
    other = sets("sources.1.prefix=[]")
    tried(
        "A3",
        "no key for it",
        *given,
        *source(folder),
        *other,
        says=["second: reads", "puts nothing before each"],
    )
    unknown = sets("sources.1.prefix=['[gMASK]']")
    tried(
        "A3",
        "no key for it",
        *given,
        *unknown,
        code=1,
        says=["has no token '[gMASK]'; special tokens that it has"],
    )


def test_a4_a_key_that_is_written_twice(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    text = recipe.read_text(encoding="utf-8")
    path.write_text(text + "training: {max_steps: 2}\n", encoding="utf-8")
    before = "the first is lost"
    tried(
        "A4",
        before,
        "check",
        path,
        code=1,
        says=["key 'training' is written twice, in line", "keep one of them"],
    )
    path.write_text(text.replace("  draws: 8\n", "  draws: 8\n  draws: 9\n"), encoding="utf-8")
    tried("A4", before, "check", path, code=1, says=["key 'draws' is written twice"])
    twice = sets("training={max_steps: 2, max_steps: 3}")
    tried("A4", before, "check", recipe, *twice, code=1, says=["key 'max_steps' is written twice"])


@pytest.mark.parametrize(
    ("folder", "column", "value", "stage"),
    [
        ("externalize/second", "kept_ids", 60_000, "fuse"),
        ("externalize/second", "kept", 0, "fuse"),
        ("externalize/target", "bytes", 60_000, "fuse"),
        ("fuse", "outcomes", 60_000, "train"),
        ("fuse", "masses", 2.5, "train"),
    ],
)  # fmt: skip
def test_a5_wrong_numbers_under_right_checksums(
    tried: Tried, run: Path, folder: str, column: str, value: float, stage: str
) -> None:
    def change(columns: Columns) -> None:
        columns[column].values[5] = value

    rewrite_columns(run / folder, SHARD, change)
    for later in ("fuse", "train")[("fuse", "train").index(stage) :]:
        shutil.rmtree(run / later)
    before = "SIGSEGV, or fused in silence; “whole”"
    says = [f"{SHARD} is damaged (block 0, column '{column}'", "--repair"]
    all_of_it = sets("training.max_steps=-1") if stage == "train" else []
    tried("A5", before, stage, run, *all_of_it, code=1, says=says)
    if column != "bytes":  # to which the texts belong, which a store has not
        tried("A5", before, "store", "verify", run / folder, code=1, says=[f"column '{column}'"])


def test_a6_no_file_lets_code_run(tried: Tried, run: Path, world: Path) -> None:
    model = model_of(
        world,
        run / "model",
        model_type="own",
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (model / "own.py").write_text(f"open({str(run / 'ran')!r}, 'w')\n")
    text = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    text["sources"][1] |= {"model": "model", "trust_remote_code": True}
    (run / "recipe.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    before = "ran the code"
    tried("A6", before, "inspect", run, "--block", 0, code=1, says=["comes with code of its own"])
    tried("A6", before, "report", run, says=["Report: "])
    tried("A6", before, "status", run, says=["externalize/second"])
    tried("A6", before, "store", "cat", run / "externalize" / "second", says=["block 0"])
    says = ["/model/own.py", "Read it, then give --trust-remote-code"]
    tried("A6", before, "check", run, code=1, says=says)
    tried("A6", before, "evaluate", model, "--suite", "smoke", code=1, says=["code of its own"])
    assert not (run / "ran").exists()


def test_a7_links_inside_a_run(tried: Tried, run: Path, tmp_path: Path) -> None:
    victim, others = tmp_path / "victim", tmp_path / "checkpoints" / "checkpoint-7"
    victim.write_text("not of this run")
    others.mkdir(parents=True)
    (others / "optimizer.pt").write_text("not of this run")
    for name, before in ((".lock", "emptied it"), (f"{SHARD}.writing", "overwrote it")):
        shutil.rmtree(run / "fuse")
        (run / "fuse").mkdir()
        (run / "fuse" / name).symlink_to(victim)
        tried(
            "A7", before, "fuse", run, code=1, says=[f"{name} is a link, to {victim}", "remove it"]
        )
        assert victim.read_text() == "not of this run"
    shutil.rmtree(run / "fuse")
    tried("A7", "", "fuse", run)
    shutil.rmtree(run / "train")
    (run / "train").mkdir()
    (run / "train" / "fused-checkpoints").symlink_to(others.parent)
    tried("A7", "another training lost them", "train", run, code=1, says=["is a link out of"])
    assert (others / "optimizer.pt").read_text() == "not of this run"
    (run / "externalize").rename(tmp_path / "elsewhere")
    (run / "externalize").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "second")
    tried("A7", "wrote there", "externalize", run, code=1, says=["is a link out of"])


def test_a8_a_fingerprint_covers_what_is_loaded(
    tried: Tried, recipe: Path, world: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = model_of(world, tmp_path / "model")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], lora_alpha=8)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    model.save_pretrained(folder)

    def fingerprint() -> str:
        told = tried(
            "A8",
            "lora_alpha moved logits by 15, and not the fingerprint",
            "check",
            recipe,
            "--out",
            tmp_path / "run",
            "--json",
            *source(folder),
        )
        return str(json.loads(told)["models"]["second"]["fingerprint"])

    first = fingerprint()
    edit(folder / "adapter_config.json", lambda found: found.update(lora_alpha=64))
    assert fingerprint() != first
    (folder / "adapter_config.json").write_text("[" * 100_000)
    outside = model_of(world, tmp_path / "outside")
    (outside / "model.safetensors").rename(outside / "one.safetensors")
    (outside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "../model/model.safetensors"}})
    )
    says = ["names a file outside of its folder (../model/model.safetensors)"]
    tried("A8", "read it", "check", recipe, *source(outside), code=1, says=says)


def test_a9_what_would_be_shown_is_for_the_test_that_is_made(tried: Tried, world: Path) -> None:
    from fusellm.evaluation.compare.statistics import LEVEL, smallest_shown

    one, of_27 = (smallest_shown(250, 40, LEVEL / tasks) for tasks in (1, 27))
    assert one is not None
    assert of_27 is not None
    assert of_27 > 1.2 * one
    says = ["after Holm's correction over the tasks"]
    command = ("evaluate", world / "llama", world / "neox", "--suite", "smoke", "--limit", 12)
    tried("A9", "“≥ x would be” of one task at 5 %, whatever the tasks", *command, says=says)


def test_a10_few_documents(tried: Tried, world: Path) -> None:
    from fusellm.evaluation.compare.statistics import estimates

    rng = np.random.default_rng(0)
    nulls = rng.normal(size=(10, 400)) ** 3  # documents × comparisons
    p_values = [one.p for one in estimates(nulls, np.ones(10), 2_000, rng)]
    assert np.mean([p < 0.05 for p in p_values]) < 0.07
    says = ["too few documents to show any difference"]
    command = ("evaluate", world / "llama", world / "neox", "--suite", "smoke", "--limit", 5)
    tried("A10", "8.5 to 11 % of equal models called different; no word", *command, says=says)


# A11 (crossed positions) is about what is learned there: docs/translation-by-situation.md and
# tests/test_fusion.py.


# B. Late, raw, or a dead end


@pytest.mark.parametrize(
    ("change", "before", "says"),
    [
        ("report_to=wandb", "a traceback, once training began", "pip install wandb"),
        ("per_device_train_batch_size=0", "the same", "is 0, and has to be 1 or more"),
        (
            "seed=4294967296",
            "the same; its cure read the sources again",
            "and has to be a number up to",
        ),
        ("optim=adamw_bnb_8bit", "the same", "pip install -U bitsandbytes"),
        ("lr_scheduler_type=cosine_with_min_lr", "the same", "lr_scheduler_kwargs"),
        ("dataloader_persistent_workers=true", "the same", "persistent_workers: true cannot be"),
        ("max_grad_norm=-1", "the gradient was turned round", "is -1, and has to be 0 or more"),
        ("max_steps=0", "all epochs were trained", "1 or more; -1 is for all epochs"),
        ("per_device_eval_batch_size=4", "had no effect", "in batches of evaluation.batch_tokens"),
        ("dataloader_num_workers=5000", "started 5,000 processes", "has to be 0 to 128"),
    ],
)
def test_b1_settings_of_a_training(
    tried: Tried, recipe: Path, tmp_path: Path, change: str, before: str, says: str
) -> None:
    """Each of transformers' settings, with what it cannot be: tests/test_training_settings.py."""
    for command in (("check", recipe), ("run", recipe, "--out", tmp_path / "run")):
        tried("B1", before, *command, *sets(f"training.{change}"), code=1, says=[says])
    assert not (tmp_path / "run").exists()


def test_b1_places_that_cannot_be_written(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = ("--out", tmp_path / "file" / "run")
    before = "`check` passed it"
    tried("B1", before, "check", recipe, *out, code=1, says=["file is a file; give another place"])
    save = ("--suite", "smoke", "--limit", 1, "--save", "/proc/table.md")
    before = "told when all had been measured"
    tried("B1", before, "evaluate", "zoo/prose", *save, code=1, says=["/proc cannot be written to"])


@pytest.mark.parametrize(
    ("change", "before", "says"),
    [
        (
            holding("model.safetensors", POINTER),
            "passed; raw and late",
            ["is a Git LFS pointer and not the file itself; fetch it: git -C"],
        ),
        (
            configured(model_type="t5", architectures=["T5ForConditionalGeneration"]),
            "passed; raw and late",
            ["an encoder with a decoder; fusellm reads causal"],
        ),
        (
            holding("model.safetensors", "cut off"),
            "passed",
            ["is no whole safetensors file", "fetch it again"],
        ),
        (
            configured(intermediate_size=64),
            "one line a tensor",
            [" more); take both from one place"],
        ),
        (
            configured(quantization_config={"quant_method": "gptq", "bits": 4}),
            "“unforeseen ImportError”",
            ["is stored quantized (gptq), and cannot be loaded so"],
        ),
        (
            configured(num_hidden_layers=10**9),
            "took all memory of the machine",
            ["has num_hidden_layers: 1,000,000,000, more than any model"],
        ),
        (
            configured(max_position_embeddings=0),
            "taken as any length",
            ["has max_position_embeddings: 0, a context without tokens"],
        ),
        (
            holding("config.json", '{"a":' * 100_000),
            "“unforeseen RecursionError”",
            ["the config.json of", "cannot be used", "fetch it again"],
        ),
    ],
    ids=["lfs", "t5", "cut", "shapes", "gptq", "layers", "context", "deep"],
)
def test_b2_weights_by_their_headers(
    tried: Tried,
    recipe: Path,
    world: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    before: str,
    says: list[str],
    request: pytest.FixtureRequest,
) -> None:
    model = model_of(world, tmp_path / request.node.callspec.id)
    change(model)
    told = tried("B2", before, "check", recipe, *source(model), code=1, says=says)
    assert len(told) < 600


def test_b3_special_tokens_above_the_head(
    tried: Tried, recipe: Path, world: Path, tmp_path: Path
) -> None:
    folder = model_of(world, tmp_path / "padded", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    before = "“give it its own tokenizer”, which it is"
    tried(
        "B3",
        before,
        "check",
        recipe,
        "--out",
        tmp_path / "run",
        *source(folder),
        says=["all found"],
    )
    command = ("evaluate", folder, "--suite", "smoke", "--limit", 2)
    tried("B3", "IndexError", *command, says=["smoke"])
    tokenizer.add_tokens(["ordinary"])
    tokenizer.save_pretrained(folder)
    says = ["'ordinary' among those beyond; resize its embeddings"]
    tried("B3", before, "check", recipe, *source(folder), code=1, says=says)


def without_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def as_table(model: Path) -> None:
    without_tokenizer(model)
    (model / "tokenizer.model").write_bytes(b"\n\x0b\n")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda m: edit(m / "tokenizer.json", lambda found: found["model"].update(vocab=7)),
            ["cannot read the tokenizer.json of", "pip install --upgrade tokenizers transformers"],
        ),
        (
            holding("tokenizer.json", "[" * 100_000),
            ["is no JSON (it is nested too deep); fetch it again"],
        ),
        (without_tokenizer, ["has no tokenizer: ", "name another model's as `tokenizer:`"]),
        (as_table, ["has its tokenizer as tokenizer.model alone", "fusellm[sentencepiece]"]),
    ],
    ids=["newer", "deep", "none", "table"],
)
def test_b4_tokenizer_files(
    tried: Tried,
    recipe: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    says: list[str],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr("fusellm.models.tokenizer_faults._installed", lambda module: False)
    model = model_of(world, tmp_path / request.node.callspec.id)
    change(model)
    before = "a traceback, or “install tiktoken”"
    tried("B4", before, "check", recipe, *source(model), code=1, says=says)
    tried("B4", before, "tokenizers", model, world / "llama", code=1, says=says)


def test_b5_one_long_text(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    text = "\n".join(prose(n) for n in range(90))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    (tmp_path / "crlf.md").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    for name in ("book.txt", "crlf.md"):
        out = tmp_path / name[:4]
        given = ("corpus", recipe, "--out", out, *files(tmp_path / name))
        budget = sets("corpus.train_bytes=9_000")
        says = ["documents cut by place: 1"]
        tried(
            "B5", "“raise validation_share”; 192,600 bytes for 20,000", *given, *budget, says=says
        )
        read = read_part(open_corpus(out), "train")
        assert 8_500 < sum(len(block.text.encode()) for block in read) <= 9_000
        assert read_part(open_corpus(out), "held_out")


def test_b6_paths(tried: Tried, world: Path, tmp_path: Path) -> None:
    place = shutil.copytree(world, tmp_path / "box [v2] naïve")
    recipe = place / "recipe.yaml"
    out = ("--out", tmp_path / "run")
    tried("B6", "no file fits", "check", recipe, *out, says=["all found"])
    (place / "cut.parquet").write_bytes(b"PAR1" + b"\0" * 90)
    (place / "not.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    for name, says in (
        ("cut.parquet", ["cut.parquet cannot be read as parquet", "fetch or make it anew"]),
        ("not.jsonl.gz", ["not.jsonl.gz is not packed, though its name says so"]),
    ):
        tried("B6", "a traceback", "check", recipe, *out, *files(name), code=1, says=says)
    says = [f"there is no folder {tmp_path / 'recipes'} for mine.yaml; make it first"]
    tried("B6", "a traceback", "init", tmp_path / "recipes" / "mine.yaml", code=1, says=says)
    tried(
        "B6",
        "“. exists already”",
        "init",
        tmp_path,
        code=1,
        says=["is a folder; name a file in it"],
    )
    before = "asked for on the hub, in silence"
    for name, part in (
        ("./nothing", "there is no model folder ./nothing; check the path"),
        ("nothing", "there is no folder of the model nothing, and of the hub"),
        ("prose.jsonl", "is a file; give the folder that it is in"),
        ("https://huggingface.co/gpt2", "is an address; give the name on the hub alone"),
    ):
        tried("B6", before, "check", recipe, *source(name), code=1, says=[part])
    says = ["neither as a recipe nor as a run; check the path"]
    tried(
        "B6",
        "“`fusellm init runs/mine` writes” one",
        "report",
        tmp_path / "runs",
        code=1,
        says=says,
    )


def test_b7_what_a_cure_leads_to(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    says = ["it needs externalize.scheme: top, objective.rest: renormalize, fusion.strategy: bytes"]
    before = "“use rest: renormalize”, which was refused: “use bucket”"
    warm = sets("objective.temperature=2")
    tried("B7", before, "check", recipe, *out, *warm, code=1, says=says)
    warm += sets("externalize.scheme=top", "objective.rest=renormalize", "fusion.strategy=bytes")
    tried("B7", before, "check", recipe, *out, *warm, says=["all found"])
    no_share = sets("corpus.held_out_share=0")
    tried("B7", "", "corpus", recipe, *out, *no_share, code=1, says=["raise corpus.held_out_share"])
    tried("B7", "“made from something else … --redo”", "corpus", recipe, *out)
    other = sets("corpus.block_bytes=200")
    says = ["was made from something else", "corpus.block_bytes", "--redo"]
    tried("B7", "", "corpus", recipe, *out, *other, code=1, says=says)
    says = [f"`fusellm run` would stop: {tmp_path / 'run'}/corpus was made from something else"]
    tried("B7", "tried the text of the other corpus", "check", recipe, *out, *other, says=says)
    told = tried(
        "B7",
        "moved eight folders",
        "corpus",
        recipe,
        *out,
        *other,
        "--redo",
        says=["moved corpus to"],
    )
    assert "externalize" not in told


def test_b8_and_b9_a_stopped_training_and_a_damaged_checkpoint(tried: Tried, run: Path) -> None:
    """One process: SIGTERM while it trains; then its checkpoint has a flipped bit."""
    shutil.rmtree(run / "train")
    steps = sets("training.max_steps=150", "training.save_steps=20", "training.clm_baseline=false")
    command = [sys.executable, "-m", "fusellm", "train", str(run), *steps]
    started = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    checkpoints = run / "train" / "fused-checkpoints"
    try:
        while not list(checkpoints.glob("checkpoint-*")):
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        told = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 128 + signal.SIGTERM, told
    assert told.splitlines()[-1] == "stopped; the same command goes on from here"
    (whole,) = (path.parent for path in checkpoints.glob("checkpoint-*/saved-whole"))
    last = whole / "model.safetensors"
    tried.note(
        "B8",
        f"kill -TERM $(pid of fusellm train {run})",
        "no word, no checkpoint",
        told.splitlines()[-1],
    )
    flip(last, last.stat().st_size // 2)
    says = ["model.safetensors was damaged after it was saved", "kept as", "training begins anew"]
    tried("B9", "trained on a flipped bit", "train", run, *steps, says=says)
    assert not list(checkpoints.glob("checkpoint-*"))


def test_b10_file_systems(
    tried: Tried, run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def no_lock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        patch.setattr(fcntl, "flock", no_lock)
        tried(
            "B10",
            "“another process is writing”, for ever",
            "corpus",
            recipe,
            "--out",
            tmp_path / "new",
        )
    refused: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: mode == os.R_OK)
        patch.setattr("tempfile._mkstemp_inner", lambda *found: refused.append(found))
        tried("B10", "refused", "report", run, says=["Report: "])
        tried("B10", "refused", "evaluate", run, says=["Compared on"])
    assert refused == []


def test_b11_messages_help(tried: Tried, recipe: Path, world: Path, tmp_path: Path) -> None:
    unknown = model_of(world, tmp_path / "new", model_type="newthing")
    before = "contradicted itself, or was cut"
    says = [
        "model type 'newthing', which the installed transformers",
        "pip install --upgrade transformers",
    ]
    tried("B11", before, "check", recipe, *source(unknown), code=1, says=says)
    own = model_of(world, tmp_path / "own", model_type="own", auto_map={"AutoConfig": "own.Own"})
    says = ["trust_remote_code: true and you, having read it, give --trust-remote-code"]
    tried("B11", before, "check", recipe, *source(own), code=1, says=says)
    suites = sets("evaluation.suites=[humaneval]")
    says = ["evaluation.data_dir, or --data-dir of fusellm evaluate"]
    tried("B11", "named an option that it lacks", "check", recipe, *suites, code=1, says=says)
    says = ["it is not asked, as HF_HUB_OFFLINE is set. Check the name"]
    tried(
        "B11",
        "cut at “offline mode at 'https://”",
        "tokenizers",
        "nobody/nothing",
        world / "llama",
        code=1,
        says=says,
    )
    for change, part in (
        ("name=../x", "only letters, digits and . _ - may be in it"),
        ("corpus.train_bytes=10MB", "a whole number is needed, got '10MB'; write it in digits"),
        ("sources.7.model=x", "the list has the entries 0 to 1; name one by its number"),
        ("=3", "must be KEY=VALUE, like objective.lambda=0.7"),
    ):
        tried(
            "B11", "pydantic's words, or none", "check", recipe, *sets(change), code=1, says=[part]
        )


def test_b12_near_duplicates_by_all_8_grams(tried: Tried) -> None:
    words = [f"word{n}" for n in range(120)]

    def document(name: str, text: list[str]) -> Document:
        return Document(name, "prose", "train", " ".join(text))

    most = document("held", words)
    seen = document("train", words[:75] + [f"other{n}" for n in range(45)])
    apart = document("apart", [f"third{n}" for n in range(120)])
    kept, dropped = drop_near_duplicates([most], [seen, apart])
    assert ([one.name for one in kept], dropped) == (["apart"], 1)
    tried.note(
        "B12",
        "fusellm corpus (builtin)",
        "58 % of a document's 8-grams in train, judged on a quarter",
        "dropped",
    )


# C. Security


def test_c1_processes_of_a_training(tried: Tried, recipe: Path, tmp_path: Path) -> None:
    """That they listen to this machine alone: tests/test_doors.py."""
    import torch

    from fusellm.training.launch import _environment

    told = _environment(0, 2, tmp_path)
    assert told["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert not {"MASTER_ADDR", "MASTER_PORT"} & told.keys()
    if torch.accelerator.is_available():
        return
    out = ("--out", tmp_path / "run")
    says = ["core(s) and no GPU; give as many at most"]
    tried("C1", "started 5,000 processes", "run", recipe, *out, "--nproc", 5000, code=1, says=says)
    assert not (tmp_path / "run").exists()


def test_c2_what_a_terminal_is_sent(
    tried: Tried, recipe: Path, world: Path, tmp_path: Path
) -> None:
    before = "reached the terminal; a traceback of Rich"
    fields = tmp_path / "fields.jsonl"
    fields.write_text(json.dumps({ESCAPE: "x"}) + "\n")
    folder = model_of(world, tmp_path / f"{ESCAPE}model", architectures=[f"{ESCAPE}GPTNeoX"])
    out = ("--out", tmp_path / "run")
    for command, code in (
        (("check", recipe, *sets(f"{ESCAPE}=1")), 1),
        (("check", recipe, *files(fields)), 1),
        (("check", recipe, *out, *sets(f"sources.1.model={json.dumps(str(folder))}")), 0),
        (("status", tmp_path / f"{ESCAPE}none"), 1),
        (("check", recipe, *sets(f"sources.1.prefix={json.dumps([ESCAPE])}")), 1),
    ):
        told = tried("C2", before, *command, code=code)
        assert "\x1b" not in told
        assert "\u202e" not in told


@pytest.mark.parametrize(
    ("family", "before"),
    [
        ("AF_VSOCK", "was made: it reaches the host of a virtual machine"),
        ("AF_NETLINK", "was made"),
        ("AF_INET", "was made, with nothing to reach"),
    ],
)
def test_c3_sockets_of_generated_programs(tried: Tried, family: str, before: str) -> None:
    """Memory in their buffers, and what more is refused: tests/test_sandbox.py."""
    try:
        sandbox = find_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))
    program = f"import socket; socket.socket(socket.{family})"
    done = sandbox.run(["python3", "-I", "-c", program], Limits())
    assert b"Address family not supported" in done.stderr
    tried.note("C3", f"a program: {program}", before, "Address family not supported")


def test_c4_secrets(tried: Tried, recipe: Path) -> None:
    before = "kept in recipe, manifest, report and the card"
    for change in (
        "training.hub_token=hf_short",
        "training.clm={hub_token: hf_short}",
        "evaluation.data_dir=https://me:hf_short@example.org/data",
    ):
        says = ["holds an access token", "set HF_TOKEN"]
        told = tried("C4", before, "check", recipe, *sets(change), code=1, says=says)
        assert "hf_short" not in told


def test_c5_bombs_and_what_is_made_to_harm(
    tried: Tried, recipe: Path, world: Path, run: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"text": "' + b"a" * (80 << 20) + b'"}\n', 1))
    out = ("--out", tmp_path / "out")
    says = ["is longer than 64 MiB, the longest record that is read"]
    tried("C5", "1.7 GB of memory", "corpus", recipe, *out, *files(bomb), code=1, says=says)
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"text": ["a" * (70 << 20)]})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    tried(
        "C5",
        "read it",
        "corpus",
        recipe,
        *out,
        *files(tmp_path / "bomb.parquet"),
        code=1,
        says=says,
    )
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
    )
    for text, part in (
        (aliases, "more than 10,000 values"),
        ("a: " + "[" * 9_000, "nested more than 20 deep"),
    ):
        (tmp_path / "made.yaml").write_text(text)
        tried("C5", "minutes, or a traceback", "check", tmp_path / "made.yaml", code=1, says=[part])
    model = model_of(world, tmp_path / "huge")
    edit(
        model / "tokenizer.json",
        lambda t: t["model"]["vocab"].update(
            {max(t["model"]["vocab"], key=t["model"]["vocab"].get): 1_500_000_000}
        ),
    )
    says = ["tokens in its tokenizer", "resize its embeddings"]
    tried("C5", "aborted", "check", recipe, *source(model), code=1, says=says)
    for name in ("/proc/self/environ", "/dev/zero"):
        given = files(name, format="text")
        tried(
            "C5",
            "read it",
            "check",
            recipe,
            *given,
            code=1,
            says=["is no ordinary file but a pipe"],
        )
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert str(world) not in page
    tried.note("C5", "fusellm report", "absolute paths on the page", "names alone")
    (run / "externalize" / "second" / "manifest.json").write_text("[" * 100_000)
    tried("C5", "a traceback", "status", run, code=1, says=["manifest.json is damaged"])
    (run / "fuse" / "counts.json").write_text("[" * 100_000)
    says = ["is not what `fusellm fuse` writes", "writes it again"]
    tried("C5", "a traceback", "report", run, code=1, says=says)


def test_c6_packages(tried: Tried) -> None:
    """What is in it: tests/test_lock.py. Overridden methods: tests/test_trainer_methods.py."""
    lock = Path(__file__).resolve().parents[1] / "requirements.lock"
    if not lock.exists():
        pytest.skip("the tests of an installed package come without its lock")
    text = lock.read_text(encoding="utf-8")
    pinned = text.count("==")
    assert pinned > 100
    assert text.count("--hash=sha256:") > pinned
    after = "every package but torch is pinned, with the hashes of its files"
    tried.note("C6", "make demo", "pinned 1 of 119 packages, none by hash", after)


# D. Rough edges


def test_d_rough_edges(tried: Tried, recipe: Path, run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    tried("D", "no such option", "--version", says=["fusellm 0."])
    tried("D", "no such command", "help", "run", says=["Run all stages of a recipe"])
    one = jsonl(tmp_path / "one.jsonl", [prose(n) for n in range(40)])
    links, real = tmp_path / "links", tmp_path / "real"
    real.mkdir()
    links.mkdir()
    shutil.copy(one, real / "one.jsonl")
    (links / "data").symlink_to(real)
    told = tried(
        "D",
        "“27.2M/0 bytes”; skipped linked folders",
        "corpus",
        recipe,
        *out,
        *files(links / "**" / "*.jsonl"),
    )
    assert "/0 bytes" not in told
    assert "1 shards" not in told
    tried(
        "D",
        "wrote into the folder that it was in",
        "run",
        recipe,
        "--out",
        "",
        code=2,
        says=["the name of the folder is empty"],
    )
    tried(
        "D",
        "“Input should be a valid string”",
        "check",
        recipe,
        *sets("name=2024"),
        code=1,
        says=["YAML reads it as a number: put it in quotes"],
    )
    text = sets("target=zoo/prose", "sources=[zoo/python]", "corpus.block_bytes=512")
    tried(
        "D",
        "“Input should be a dictionary”",
        "check",
        recipe,
        *out[:1],
        tmp_path / "b",
        *text,
        says=["zoo/prose", "zoo/python"],
    )
    gone = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    del gone["sources"][1]
    (run / "recipe.yaml").write_text(yaml.safe_dump(gone), encoding="utf-8")
    tried("D", "“done”", "status", run, says=["not in the recipe"])


def test_d_warnings_and_long_lines(
    tried: Tried, run: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.rmtree(run / "train")
    some = sets(
        "training.gradient_checkpointing=true",
        "training.max_steps=1",
        "training.clm_baseline=false",
    )
    told = tried("D", "a FutureWarning; lines folded at 80 columns", "train", run, "--redo", *some)
    assert "FutureWarning" not in told
    assert [w for w in recwarn if issubclass(w.category, FutureWarning)] == []


if __name__ == "__main__":  # in a process of its own, which is offline from its beginning
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__]
    sys.exit(subprocess.call(command, stderr=subprocess.DEVNULL))
