"""Vocabulary maps kept between runs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import worlds
from fusellm.alignment.strategies import STRATEGIES
from fusellm.alignment.translation import VocabularyMap
from fusellm.store.translations import cache_folder, cached_translation
from fusellm.tokens.encode import Encoder

SIZES = len(worlds.byte_bpe().vocabulary), len(worlds.sentencepiece().vocabulary)


def made_once(calls: list[str]) -> VocabularyMap:
    calls.append("made")
    pair = worlds.byte_bpe(), worlds.sentencepiece()
    return STRATEGIES["partition"].translate(*pair, None)


def equal(mine: VocabularyMap, theirs: VocabularyMap) -> bool:
    return (
        np.array_equal(mine.outcome_of_source, theirs.outcome_of_source)
        and np.array_equal(mine.outcome_of_target, theirs.outcome_of_target)
        and (mine.outcomes, mine.complete) == (theirs.outcomes, theirs.complete)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_map_is_made_once_for_a_pair_of_tokenizers(folder: Path) -> None:
    calls: list[str] = []
    first = cached_translation("partition", "a" * 64, "b" * 64, SIZES, lambda: made_once(calls))
    again = cached_translation("partition", "a" * 64, "b" * 64, SIZES, lambda: made_once(calls))
    assert equal(first, again)
    assert calls == ["made"]
    make = partial(made_once, calls)
    for other in [("bytes", "a", "b"), ("partition", "c", "b"), ("partition", "a", "c")]:
        cached_translation(other[0], other[1] * 64, other[2] * 64, SIZES, make)
    assert len(calls) == 4
    assert len(list(folder.rglob("*"))) == 1 + 4  # the folder, and nothing half written


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_made_anew(folder: Path, damage: str) -> None:
    calls: list[str] = []
    first = cached_translation("partition", "a", "b", SIZES, lambda: made_once(calls))
    (path,) = (folder / "maps").iterdir()
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no map"}[damage])
    assert equal(cached_translation("partition", "a", "b", SIZES, lambda: made_once(calls)), first)
    assert equal(cached_translation("partition", "a", "b", SIZES, lambda: made_once(calls)), first)
    assert calls == ["made", "made"]


def test_without_a_place_to_keep_it_a_map_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FUSELLM_CACHE", str(tmp_path / "file"))
    calls: list[str] = []
    for _ in range(2):
        cached_translation("partition", "a", "b", SIZES, lambda: made_once(calls))
    assert calls == ["made", "made"]


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSELLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/fusellm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fusellm"


def test_equal_tokenizers_may_have_heads_of_different_sizes() -> None:
    """Special tokens behind the others: one model has rows for them, the other has none."""
    tokenizer = worlds.encoder_of("byte-bpe").tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rows = backend.get_vocab_size()
    backend.add_special_tokens(["<pad>", "<image>"])
    eos = tokenizer.eos_token
    whole, cut = (
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos), limit)
        for limit in (None, rows)
    )
    assert (len(whole.vocabulary), len(cut.vocabulary)) == (rows + 2, rows)
    for source, target in ((whole, cut), (cut, whole)):
        map_ = STRATEGIES["partition"].translate(source, target, None)
        assert len(map_.outcome_of_source) == len(source.vocabulary)
        assert len(map_.outcome_of_target) == len(map_.sets.ids) == len(target.vocabulary)
        text = np.flatnonzero(cut.vocabulary.is_text)
        assert np.array_equal(map_.outcome_of_source[text], map_.outcome_of_target[text])
