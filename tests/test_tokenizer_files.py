"""Tokenizers that cannot be loaded, or that know more tokens than their model has rows for."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import worlds
from conftest import prose
from fusellm.cli.main import main
from fusellm.config import ExternalizeSettings, ModelSettings
from fusellm.errors import ModelError, TokenizerError
from fusellm.models import tokenizer_faults
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.models.readers import reader_of
from fusellm.models.tokenizers import tokenizer_at
from fusellm.reading.source_reader import SourceReader


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A model to do something to."""
    return Path(shutil.copytree(world / "llama", tmp_path / "model"))


def with_layout(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def alone(folder: Path, content: bytes, name: str = "tokenizer.model") -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / name).write_bytes(content)


def code_of_its_own(folder: Path) -> None:
    alone(folder, b"class Own: ...\n", "own.py")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


CANNOT_READ = r"the installed tokenizers [\d.]+\w* cannot read the tokenizer.json of .*, its "
UPGRADE = "pip install --upgrade tokenizers transformers, or fetch it again"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (
        lambda f: with_layout(f, model={"type": "BPE", "vocab": 7}),
        rf"{CANNOT_READ}model \(BPE\): .*{UPGRADE}",
    ),
    "part": (
        lambda f: with_layout(f, pre_tokenizer={"type": "Newest", "step": 1}),
        rf"{CANNOT_READ}pre_tokenizer \(Newest\): .*{UPGRADE}",
    ),
    "no JSON": (
        lambda f: (f / "tokenizer.json").write_text('{"version": '),
        "the tokenizer.json of .* is no JSON .*; fetch it again",
    ),
    "Git LFS": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json of .* is a Git LFS pointer .*: git -C .* lfs pull",
    ),
    "SentencePiece": (
        lambda f: alone(f, b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"),
        r"tokenizer.model alone, .* sentencepiece and protobuf: pip install 'fusellm\[sentencep",
    ),
    "T5's": (
        lambda f: alone(f, b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "spiece.model"),
        r"spiece.model alone, .* a SentencePiece model",
    ),
    "tiktoken": (
        lambda f: alone(f, b"IQ== 0\nIg== 1\n"),
        "tokenizer.model alone, .* a table of tiktoken, .*: pip install tiktoken",
    ),
    "nothing": (
        lambda f: alone(f, b"", "merges.log"),
        r"holds no tokenizer that can be loaded \(it holds: config.json, .*\); give a folder",
    ),
    "own code": (
        code_of_its_own,
        "the tokenizer of .* comes with code of its own, which runs only where .* you, having read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_why_a_tokenizer_cannot_be_loaded_is_one_line_with_the_cure(
    copied: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """By every door, and never another package than the one that is missing."""
    monkeypatch.setattr(tokenizer_faults, "_installed", lambda module: False)
    change, message = FAULTS[fault]
    change(copied)
    with pytest.raises(ModelError, match=message):
        tokenizer_at(str(copied))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(locate(ModelSettings(model=str(copied))))
    for arguments in (
        ("tokenizers", copied, world / "llama"),
        ("check", world / "recipe.yaml", "--set", f"target.model={copied}"),
        ("evaluate", copied, "--suite", "smoke", "--out", tmp_path / "out"),
    ):
        monkeypatch.setattr(sys, "argv", ["fusellm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        captured = capsys.readouterr()
        (line,) = [one for one in captured.err.splitlines() if one.startswith("fusellm: ")]
        assert "tiktoken" not in line or fault == "tiktoken" or fault == "nothing"


def test_a_package_that_is_there_is_not_asked_for(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_faults, "_installed", lambda module: True)
    for content in (b"no SentencePiece model at all", b"IQ== 0\n"):
        alone(copied, content)
        with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
            tokenizer_at(str(copied))
    assert tokenizer_faults._is_tiktoken(copied / "tokenizer.model")


# More tokens than rows


def with_token(folder: Path, token: str, special: bool, **names: str) -> int:
    """Give a tokenizer one token more than its model has rows; its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=special)
    for name, value in names.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(token))


def test_special_tokens_above_the_head_are_taken_and_never_receive_mass(copied: Path) -> None:
    id_ = with_token(copied, "<pad>", True, pad_token="<pad>")
    reader = reader_of(ModelSettings(model=str(copied)))
    assert len(reader.encoder.vocabulary) == id_
    model = load_model(reader.located, torch.device("cpu"))
    texts = ["the model reads a <pad> here", prose(3)]
    encoded = reader.encoder.encode(texts, [True, False])
    assert max(int(block.ids.max()) for block in encoded) < id_
    settings = ExternalizeSettings(scheme="top", k=600, mass=None)
    read = SourceReader(model, len(reader.encoder.vocabulary), settings, 0).read(texts, encoded)
    assert read.kept.ids.max() == id_ - 1
    assert read.kept.tail.max() < 1e-5


def test_a_pad_token_above_the_head_is_evaluated(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Prompts of a batch are padded: by a token that the model has."""
    pytest.importorskip("lm_eval")
    with_token(copied, "<pad>", True, pad_token="<pad>")
    arguments = ("evaluate", copied, "--suite", "smoke", "--limit", "3", "--too-long", "truncate")
    out = ("--out", tmp_path / "out", "--max-new-tokens", "4", "--json")
    monkeypatch.setattr(sys, "argv", ["fusellm", *map(str, (*arguments, *out))])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)


def test_tokens_that_a_text_can_have_need_a_row(copied: Path) -> None:
    with_token(copied, "<table>", False)
    with pytest.raises(ModelError, match=r"tokens in its tokenizer, '<table>' among those beyond"):
        reader_of(ModelSettings(model=str(copied)))


def test_the_token_that_ends_a_text_needs_a_row(copied: Path) -> None:
    id_ = with_token(copied, "<|im_end|>", True, eos_token="<|im_end|>")
    with pytest.raises(ModelError, match=rf"ends a text, <\|im_end\|> \({id_}\); set eos_token"):
        reader_of(ModelSettings(model=str(copied)))


def test_a_bos_that_is_not_put_needs_no_row_and_one_that_is_does(
    copied: Path, tmp_path: Path
) -> None:
    base = AutoTokenizer.from_pretrained(copied)
    worlds.putting(base, ["<begin>"]).save_pretrained(copied)
    with pytest.raises(TokenizerError, match=r"puts <begin> \(\d+\) before each .* prefix: \[\]"):
        reader_of(ModelSettings(model=str(copied)))
    reader = reader_of(ModelSettings(model=str(copied), prefix=[]))
    assert reader.encoder.vocabulary.prefix_ids == ()
