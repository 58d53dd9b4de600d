"""docs/extend.md, done: each way of extending fusellm that it describes, by its own steps."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import fusellm
from fusellm.alignment import strategies
from fusellm.alignment.strategies import STRATEGIES, Strategy, boundary_aligner
from fusellm.alignment.translation import VocabularyMap, map_translation
from fusellm.config import FusionSettings
from fusellm.errors import ModelError
from fusellm.evaluation.suites import smoke
from fusellm.evaluation.suites.catalogue import SUITES, Suite
from fusellm.evaluation.suites.task import Plan
from fusellm.fusion import functions
from fusellm.fusion.functions import FUNCTIONS, Compared
from fusellm.models import heads
from fusellm.reading.engine import EngineSettings, Events, ReadingTask
from fusellm.recipe_file import resolve_paths
from fusellm.stages import externalize
from fusellm.tokens.encode import Encoder

ROOT = Path(fusellm.__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extend.md"


def test_what_the_page_names_is_there() -> None:
    """Its files, and in them its names."""
    text = PAGE.read_text("utf-8")
    files = set(re.findall(r"`((?:src|tests)/[\w/.]+)`", text))
    assert len(files) > 8
    for name in files:
        assert (ROOT / name).exists(), name
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    for name in re.findall(r"`([A-Z_a-z]\w+)`", text):
        assert re.search(rf"\b{name}\b", code), name


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another name among those that a recipe may have, as an edit of config/fusion.py gives it."""
    fields = FusionSettings.model_fields

    def add(field: str, name: str) -> None:
        known = get_args(fields[field].annotation)
        monkeypatch.setattr(fields[field], "annotation", Literal[(*known, name)])
        FusionSettings.model_rebuild(force=True)
        fusellm.Recipe.model_rebuild(force=True)

    yield add
    monkeypatch.undo()
    FusionSettings.model_rebuild(force=True)
    fusellm.Recipe.model_rebuild(force=True)


def run_of(world: Path, folder: Path, *changes: str) -> fusellm.Run:
    recipe = fusellm.load_recipe(world / "recipe.yaml", changes)
    return fusellm.Run(resolve_paths(recipe, world), folder)


def test_a_fusion_function(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: Any
) -> None:
    def last(compared: Compared) -> np.ndarray:
        """The aligned source that is named last."""
        order = -np.arange(len(compared.aligned))[:, None]
        return functions._least(order + np.zeros(compared.aligned.shape), compared.aligned)

    monkeypatch.setitem(FUNCTIONS, "last", last)
    kinds("function", "last")
    run = run_of(world, tmp_path / "run", "fusion.function=last").corpus().externalize().fuse()
    rows = fusellm.FusedDataset(run)
    sources = np.concatenate([rows[n][0]["source"] for n in range(len(rows))])
    assert (sources == 1).mean() > 0.5  # the second, wherever it is aligned


def test_a_translation_strategy(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: Any
) -> None:
    def equal_bytes(source: Encoder, target: Encoder, _: Any) -> VocabularyMap:
        """Tokens of the same bytes, and no others."""
        known = {token: id_ for id_, token in enumerate(target.vocabulary.token_bytes) if token}
        ids = [known.get(token, -1) if token else -1 for token in source.vocabulary.token_bytes]
        return map_translation(np.array(ids), target)

    monkeypatch.setitem(STRATEGIES, "equal", Strategy(equal_bytes, boundary_aligner))
    monkeypatch.setattr(strategies, "_MAPS", type(strategies._MAPS)())
    kinds("strategy", "equal")
    run = run_of(world, tmp_path / "run", "fusion.strategy=equal").corpus().externalize().fuse()
    rows = fusellm.FusedDataset(run)
    assert sum(int(rows[n][0]["parts"].sum()) for n in range(len(rows))) > 100
    first, second = (
        fusellm.Tokenizer.from_pretrained(str(world / name)) for name in ("neox", "llama")
    )
    assert fusellm.align(first, second, "a text", "equal").aligned_share > 0


def test_an_architectures_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits; as if that were not known, and then it is."""
    config = GraniteConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        logits_scaling=4.0,
    )
    torch.manual_seed(0)
    model = GraniteForCausalLM(config)
    known = heads._scale
    monkeypatch.setattr(heads, "_scale", lambda config: 1.0)
    with pytest.raises(ModelError, match="makes its logits in a way that fusellm does not know"):
        heads.check_head(model)
    monkeypatch.setattr(heads, "_scale", known)
    monkeypatch.setitem(heads._MULTIPLIERS, "granite", "one_over")
    config.one_over = 0.25
    heads.check_head(model)


def test_an_engine(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads the shards backwards: the store is the same."""
    asked: list[str] = []
    local = externalize.ENGINES["local"]

    def backwards(task: ReadingTask, settings: EngineSettings) -> Events:
        asked.extend(task.names)
        yield from local(replace(task, names=list(reversed(task.names))), settings)

    run_of(world, tmp_path / "plain").corpus().externalize("second")
    monkeypatch.setitem(externalize.ENGINES, "local", backwards)
    run_of(world, tmp_path / "run").corpus().externalize("second")
    assert len(asked) > 1
    written = list((tmp_path / "plain/externalize/second").glob("*.arrow"))
    assert len(written) == len(asked)
    for path in written:
        assert path.read_bytes() == (tmp_path / "run/externalize/second" / path.name).read_bytes()


def test_an_evaluation_suite(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one task, on data made in code."""
    pytest.importorskip("lm_eval")
    plan = Plan("patterns", "acc", "binary", smoke.PATTERNS, smoke.patterns)
    monkeypatch.setitem(SUITES, "mine", Suite("mine", "a try", "patterns", "none", (plan,)))
    llama, neox = (str(world / name) for name in ("llama", "neox"))
    (found,) = fusellm.evaluate({"one": llama, "two": neox}, ["mine"], limit=4)
    assert found.comparison.models == ("one", "two")
    (line,) = found.comparison.lines
    assert set(line.scores) == {"one", "two"}
    assert line.n == 4
