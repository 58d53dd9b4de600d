"""A tiny world on disk, made once a session: three models of different architectures and
tokenizers, and a corpus of two domains. No network, no GPU."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("COLUMNS", None)  # of pytest-xdist; consoles would keep it

import pytest
import torch
import yaml
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from fusellm.cli.main import main
from fusellm.progress import Silent
from fusellm.zoo.tokenizers import byte_level_bpe, byte_level_unigram, sentencepiece_like_bpe

pytest_plugins = ["hubs", "toolchains"]  # fixtures

Command = Callable[..., tuple[int, str, str]]

# What a shell starts in the background ignores these two, and commands leave them ignored; tests
# of stopping would wait for ever under `nohup make test &`.
for _signal, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)

_TEXT = """the model reads a text and every token of it is a piece that ends at some byte so two
readers agree where both have read the same return value def class import self print
naïve café Straße 数字 число"""
_WORDS = _TEXT.split()


def prose(seed: int, words: int = 120) -> str:
    """Some text, the same for the same seed."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 12))) for _ in range(words // 8)]
    return "\n".join(lines) + "\n"


def code(seed: int, lines: int = 20) -> str:
    """Something like Python, the same for the same seed."""
    rng = random.Random(seed)
    rows = [
        "    " * rng.randint(0, 3)
        + f"{rng.choice(_WORDS)} = {rng.choice(_WORDS)}({rng.randint(0, 99)})"
        for _ in range(lines)
    ]
    return "\n".join(rows) + "\n"


def save_llama(folder: Path, texts: list[str], seed: int = 0) -> None:
    """A tiny Llama with a SentencePiece-like tokenizer and a BOS."""
    tokenizer = sentencepiece_like_bpe(iter(texts), 512)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_neox(folder: Path, texts: list[str], seed: int = 1) -> None:
    """A tiny GPT-NeoX with byte-level BPE and a padded head."""
    tokenizer = byte_level_bpe(iter(texts), 400)
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_mpt(folder: Path, texts: list[str], seed: int = 2) -> None:
    """A tiny MPT with a byte-level Unigram."""
    tokenizer = byte_level_unigram(iter(texts), 350)
    torch.manual_seed(seed)
    config = MptConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        n_layers=1,
        n_heads=2,
        max_seq_len=512,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    MptForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Told(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSELLM_CACHE", str(folder))
        yield folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command in this process: its exit code, and what it wrote on stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fusellm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No toy is trained first, for tests that count or change what a training does."""
    monkeypatch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the models llama, neox, mpt, the corpus and recipe.yaml."""
    root = tmp_path_factory.mktemp("world")
    texts = [prose(n) + code(n) for n in range(40)]
    save_llama(root / "llama", texts)
    save_neox(root / "neox", texts)
    save_mpt(root / "mpt", texts)
    with (root / "prose.jsonl").open("w", encoding="utf-8") as file:
        for n in range(60):
            file.write(json.dumps({"text": prose(1000 + n)}, ensure_ascii=False) + "\n")
    (root / "code").mkdir()
    for n in range(40):
        (root / "code" / f"{n:02}.py").write_text(code(2000 + n), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "target": {"model": "llama"},
        "sources": [{"name": "first", "model": "llama"}, {"name": "second", "model": "neox"}],
        "corpus": {
            "documents": [
                {"files": "prose.jsonl", "domain": "prose"},
                {"files": "code/*.py", "domain": "code"},
            ],
            "block_bytes": 256,
            "validation_share": 0.1,
            "held_out_share": 0.2,
            "shard_blocks": 32,
        },
        "externalize": {"scheme": "sampled", "draws": 8},
        "objective": {"lambda": 0.5},
        "training": {
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 3,
            "validations": 2,
        },
        "evaluation": {"resamplings": 200},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium in PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page, and checks in the end that it was quiet, and asked nobody but its own host."""
    pages, wrong, hosts = list[Any](), list[str](), set[str]()

    def visit(address: str, width: int = 1280, scheme: str = "light") -> Any:
        size = {"width": width, "height": 900}
        page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
        pages.append(page)
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.locator("[data-waits]").wait_for(state="detached")
        return page

    yield visit
    for page in pages:
        assert page.evaluate("window.acted") is None  # what hostile text of the tests would set
        page.context.close()
    assert wrong == []
    assert all(host == "" or host.startswith("127.0.0.1:") for host in hosts)


@pytest.fixture
def serious_faults(browser: Any) -> Callable[..., list[Any]]:
    """What axe-core finds in a page that is serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")

    def look(address: str, width: int, scheme: str, awaited: str | None = None) -> list[Any]:
        # Its script is put into the page, which the page's own rules forbid.
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(address)
        page.locator("[data-waits]").wait_for(state="detached")
        if awaited is not None:
            page.locator(awaited).first.wait_for()
        answered = axe.Axe().run(page).response
        context.close()
        return [
            (fault["id"], fault["nodes"][0]["html"], fault["nodes"][0].get("failureSummary"))
            for fault in answered["violations"]
            if fault["impact"] in ("serious", "critical")
        ]

    return look
