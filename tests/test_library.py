"""fusellm as a library: what `import fusellm` gives, used as somebody else's script would."""

import ast
import copy
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

import fusellm
import loss_of_two
from conftest import code, prose
from fusellm.errors import (
    ArgumentError,
    FusellmError,
    ModelError,
    NumericsError,
    StoreError,
    TokenizerError,
)
from fusellm.fusion.functions import Compared, mince
from fusellm.models.load import load_model, locate
from fusellm.objective.chunked import Head
from fusellm.recipe_file import resolve_paths
from fusellm.store.blocks import open_corpus, read_part
from fusellm.text_table import text_table
from fusellm.training import loss as loss_module
from fusellm.training.forward import objective_inputs, teach_objective
from hubs import FIRST, put_in_cache

TEXTS = [prose(1, 30), code(2, 4), prose(3, 20), code(4, 3)]


@pytest.fixture(scope="module")
def target(world: Path) -> tuple[PreTrainedModel, fusellm.Tokenizer]:
    return fusellm.load_pretrained(str(world / "llama"), device="cpu")


@pytest.fixture(scope="module")
def read(world: Path) -> dict[str, fusellm.SourceDistributions]:
    """What two sources say of the texts."""
    return {
        name: fusellm.read_distributions(
            *fusellm.load_pretrained(str(world / name), device="cpu"), TEXTS
        )
        for name in ("neox", "mpt")
    }


@pytest.fixture(scope="module")
def fused(
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    read: dict[str, fusellm.SourceDistributions],
) -> fusellm.FusedDistributions:
    return fusellm.fuse(TEXTS, target[1], read)


# The face


def test_every_public_name_is_there_and_none_is_a_module() -> None:
    """Also once all modules are imported, which sets them as attributes of their packages."""
    for module in pkgutil.walk_packages(fusellm.__path__, "fusellm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in fusellm.__all__:
        assert not isinstance(getattr(fusellm, name), type(sys)), name
        assert name in dir(fusellm)
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        _ = fusellm.fuze


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((Path(fusellm.__file__).parent / "__init__.pyi").read_text("utf-8"))
    names = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == fusellm._FROM


def test_importing_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, fusellm; fusellm.__version__; dir(fusellm); "
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_public_name_has_a_place_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python-api.md").read_text("utf-8")
    for name in fusellm.__all__:
        assert re.search(rf"(`|fusellm\.){name}\b", page), name


# Text, tokens, distributions


def test_nothing_is_printed(world: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From a name to a trained model."""
    model, tokenizer = fusellm.load_pretrained(str(world / "llama"), device="cpu")
    source = fusellm.load_pretrained(str(world / "neox"), device="cpu")
    distributions = fusellm.read_distributions(*source, TEXTS)
    found = fusellm.fuse(TEXTS, tokenizer, {"neox": distributions})
    dataset = fusellm.FusedDataset(found)
    batch = fusellm.FusionCollator(dataset)([dataset[0]])
    hidden = fusellm.last_hidden(model, batch)
    fusellm.fusion_loss(hidden, model, batch["labels"], batch["outcomes"]).backward()
    fusellm.bits_per_byte(model, tokenizer, TEXTS)
    assert capfd.readouterr() == ("", "")


def test_transformers_own_models_and_tokenizers_are_taken(world: Path) -> None:
    """They give the same as ours."""
    place = str(world / "neox")
    own = fusellm.read_distributions(*fusellm.load_pretrained(place, device="cpu"), TEXTS)
    model = AutoModelForCausalLM.from_pretrained(place)
    theirs = fusellm.read_distributions(model, AutoTokenizer.from_pretrained(place), TEXTS)
    assert np.array_equal(own.kept.ids, theirs.kept.ids)
    assert np.array_equal(own.kept.true_log_prob, theirs.kept.true_log_prob)


def test_draws_are_of_the_models_distributions(world: Path) -> None:
    """Over many seeds their mean is the softmax of the logits, and top k is its head."""
    model, tokenizer = fusellm.load_pretrained(str(world / "neox"), device="cpu")
    text = TEXTS[0][:60]
    ids = torch.from_numpy(tokenizer.encode([text])[0].ids)[None]
    with torch.no_grad():
        logits = model(ids).logits[0, 5, : len(tokenizer.vocabulary)]  # others have no token
        truth = logits.softmax(-1).numpy()
    total = np.zeros(len(truth))
    for seed in range(40):
        at = fusellm.read_distributions(model, tokenizer, [text], 255, seed=seed)[0].at(5)
        total[at.ids] += at.masses
    assert np.abs(total / 40 - truth).max() < 1 / 255
    top = fusellm.read_distributions(model, tokenizer, [text], top_k=3, mass=None)[0].at(5)
    assert top.ids.tolist() == np.argsort(-truth)[:3].tolist()
    assert top.masses == pytest.approx(truth[top.ids], abs=2e-4)
    assert top.tail == pytest.approx(1 - truth[top.ids].sum(), abs=1e-3)


def test_what_was_read_is_looked_at_by_text(read: dict[str, fusellm.SourceDistributions]) -> None:
    found = read["neox"]
    assert len(found) == len(TEXTS) == len(list(found))
    for number, text in enumerate(TEXTS):
        block = found[number]
        assert (block.number, block.usable) == (number, True)
        assert block.positions == len(block.ids) - 1
        assert block.ends[-1] == len(text.encode())
    with pytest.raises(IndexError, match="no text 4"):
        _ = found[4]
    assert found[-1].number == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "a text"}, "this is one text, where a list of texts is needed"),
        ({"texts": ["a", None]}, "text 1 is a NoneType, and no str"),
        ({"texts": ["a\ud800"]}, "text 0 has half a character at 1"),
        ({"draws": 256}, "draws: Input should be less than or equal to 255, got 256"),
        ({"last": [True]}, "last has 1 entries, and there are 4 texts"),
        ({"texts": ["word " * 5000]}, "the model's context is"),
        ({"tokenizer": "gpt2"}, "a tokenizer is needed, and 'gpt2' is a str"),
        ({"model": "gpt2"}, "a model of transformers is needed, and this is a str"),
        ({"swapped": True}, "and this is a Tokenizer; give the model first, then its tokenizer"),
    ],
)
def test_what_cannot_be_read_is_said(world: Path, given: dict[str, Any], message: str) -> None:
    model, tokenizer = fusellm.load_pretrained(str(world / "llama"), device="cpu")
    arguments = {"model": model, "tokenizer": tokenizer, "texts": TEXTS} | given
    if arguments.pop("swapped", False):
        arguments |= {"model": tokenizer, "tokenizer": model}
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        fusellm.read_distributions(**arguments)


def test_a_model_whose_logits_are_made_otherwise_is_refused(world: Path) -> None:
    """Once for each model; those that are loaded here were looked at then."""
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    tokenizer = fusellm.Tokenizer.from_pretrained(str(world / "llama"))
    own = model.forward
    model.forward = lambda *a, **k: replace_logits(own(*a, **k))
    with pytest.raises(ModelError, match="makes its logits in a way that fusellm does not know"):
        fusellm.read_distributions(model, tokenizer, TEXTS)


def replace_logits(found: Any) -> Any:
    found.logits = found.logits * 3
    return found


# Alignment


def test_an_alignment_shows_as_a_table_in_terminal_and_notebook(world: Path) -> None:
    source, target = (
        fusellm.Tokenizer.from_pretrained(str(world / name)) for name in ("neox", "llama")
    )
    text = "def f(x): <b>\x1b[31m return</b>"
    alignment = fusellm.align(source, target, text)
    positions = list(alignment)
    assert len(positions) == len(alignment) == len(alignment.target_tokens) - 1
    for one in positions:
        if one.source_position is not None:  # both have read the same bytes
            read = alignment.target_ends[one.position]
            assert alignment.source_ends[one.source_position] == read
            assert one.situation != "unaligned"
        else:
            assert (one.situation, one.source_next_token) == ("unaligned", None)
    shown, html = str(alignment), alignment._repr_html_()
    assert "\x1b" not in shown
    assert "\x1b" not in html
    assert "<b>" not in html
    assert shown.count("\n") == len(alignment)
    assert html.count("<tr>") == len(alignment) + 1
    assert alignment.aligned_share == np.mean([p.source_position is not None for p in positions])


def test_a_text_that_a_tokenizer_changes_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    lower = AutoTokenizer.from_pretrained(world / "llama")
    from tokenizers.normalizers import Lowercase, Sequence

    backend = lower.backend_tokenizer
    backend.normalizer = (
        Sequence([Lowercase(), backend.normalizer]) if backend.normalizer else (Lowercase())
    )
    own = fusellm.Tokenizer.from_pretrained(str(world / "neox"))
    with pytest.raises(TokenizerError, match=r"the target's tokenizer .* changes the text 'Upper'"):
        fusellm.align(own, lower, "Upper")


@pytest.mark.parametrize("strategy", ["partition", "bytes", "em", "mined"])
def test_a_vocabulary_map_says_what_each_token_becomes(world: Path, strategy: str) -> None:
    source, target = (
        fusellm.Tokenizer.from_pretrained(str(world / name)) for name in ("neox", "llama")
    )
    found = fusellm.vocabulary_map(source, target, strategy)
    assert fusellm.vocabulary_map(source, target, strategy) is found  # it is made once
    for id_ in range(0, len(source.vocabulary), 7):
        outcome = found.outcome_of_source[id_]
        expected = found.sets[outcome] if outcome >= 0 else []
        assert found.target_ids(id_).tolist() == sorted(expected)
    with pytest.raises(ArgumentError, match="there is no strategy 'partitions'; known: partition"):
        fusellm.vocabulary_map(source, target, "partitions")


# Fusion


def test_in_memory_is_what_a_run_does(world: Path, tmp_path: Path) -> None:
    """The same blocks, read and fused by functions and by stages.

    Uniform weights: what sources are compared by is stored in steps of 1/64 nat, by which a window
    in a thousand has another winner. By as much differ the masses of a class that is split.
    """
    recipe = fusellm.load_recipe(world / "recipe.yaml", ["fusion.function=uniform"])
    run = fusellm.Run(resolve_paths(recipe, world), tmp_path / "run")
    run.execute("corpus", "externalize", "fuse")
    blocks = list(read_part(open_corpus(tmp_path / "run"), "train"))
    texts, last = [block.text for block in blocks], [block.last for block in blocks]
    recipe = run.recipe
    sources = {}
    for source in recipe.sources:
        located = locate(source)
        model = load_model(located, torch.device("cpu"))
        tokenizer = fusellm.Tokenizer.from_pretrained(source.model)
        draws = recipe.externalize.draws
        sources[source.name] = fusellm.read_distributions(
            model, tokenizer, texts, draws, last=last, seed=recipe.seed
        )
    target = fusellm.Tokenizer.from_pretrained(recipe.target.model)
    fused = fusellm.fuse(texts, target, sources, recipe.fusion.function)
    mine, stored = fusellm.FusedDataset(fused), fusellm.FusedDataset(run)
    assert len(mine) == len(stored) > 10
    for row, expected in zip(mine, stored, strict=True):
        for name, column in expected[0].items():
            if name == "masses":
                assert row[0][name] == pytest.approx(column, rel=1 / 32)
            else:
                assert np.array_equal(row[0][name], column), name
    batches = [
        fusellm.FusionCollator(dataset)([dataset[0], dataset[3]]) for dataset in (mine, stored)
    ]
    torch.testing.assert_close(batches[0]["outcomes"], batches[1]["outcomes"], rtol=1 / 32, atol=0)


def test_a_fusion_function_of_ones_own(
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    read: dict[str, fusellm.SourceDistributions],
    fused: fusellm.FusedDistributions,
) -> None:
    """It is given what the built-in ones are given."""
    same = fusellm.fuse(TEXTS, target[1], read, lambda compared: mince(compared))
    assert np.array_equal(same.fused.masses, fused.fused.masses)

    def half(compared: Compared) -> np.ndarray:
        return compared.aligned / np.maximum(compared.aligned.sum(axis=0), 1)

    mean, uniform = (fusellm.fuse(TEXTS, target[1], read, f) for f in (half, "uniform"))
    assert np.array_equal(mean.fused.masses, uniform.fused.masses)
    assert sum(mean.won.values()) == pytest.approx(1)


def test_each_text_is_routed_to_a_source(
    target: tuple[PreTrainedModel, fusellm.Tokenizer], read: dict[str, fusellm.SourceDistributions]
) -> None:
    names = [list(read)[n % 2] for n in range(len(TEXTS))]
    routed = fusellm.fuse(TEXTS, target[1], read, "route", routes=names)
    alone = {n: fusellm.fuse(TEXTS, target[1], {n: d}, "uniform") for n, d in read.items()}
    for text, name in enumerate(names):
        mine, its = routed.block(text), alone[name].block(text)
        for column in ("ids", "parts", "lengths", "outcomes", "masses", "rest"):
            assert np.array_equal(mine[column], its[column]), (text, column)
    for given, message in {
        (): "needs routes, the name of a source for each of the",
        (*names[1:], "neo"): "'neo' is no source that teaches; known: ",
    }.items():
        with pytest.raises(ArgumentError, match=message):
            fusellm.fuse(TEXTS, target[1], read, "route", routes=given)
    with pytest.raises(ArgumentError, match="routes belong to function='route'"):
        fusellm.fuse(TEXTS, target[1], read, routes=names)
    with pytest.raises(ArgumentError, match="is no source that teaches"):
        fusellm.fuse(TEXTS, target[1], read, "route", routes=names, referees=names[:1])


@pytest.mark.parametrize("function", ["mince", "avgce", "bayes"])
def test_without_hindsight_a_source_is_chosen_by_what_stands_before(
    world: Path, target: tuple[PreTrainedModel, fusellm.Tokenizer], function: str
) -> None:
    """Two texts of one beginning: up to where they part, the sources have the same weights."""
    shared = code(2, 4)
    texts = [shared + code(5, 4), shared + prose(7, 30)]
    model, tokenizer = fusellm.load_pretrained(str(world / "neox"), device="cpu")
    read = {"neox": fusellm.read_distributions(model, tokenizer, texts)}
    with torch.no_grad():
        for weights_of_layer in model.parameters():
            weights_of_layer *= 1.1
    read["other"] = fusellm.read_distributions(model, tokenizer, texts)
    ids = [encoded.ids.tolist() for encoded in target[1].encode(texts)]
    parted = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    same = parted - 3  # nearer to it a source may cut otherwise
    assert same > 20

    def weights(hindsight: bool) -> list[list[float]]:
        fused = fusellm.fuse(texts, target[1], read, function, hindsight=hindsight, beta=1.0)
        return [weights_of(fused.block(text), "neox", list(read))[:same] for text in range(2)]

    before, after = weights(False), weights(True)
    assert before[0] == pytest.approx(before[1], abs=1e-5)
    if function == "avgce":  # whose weights show the least difference
        assert after[0] != pytest.approx(after[1], abs=1e-3)


def weights_of(row: dict[str, Any], name: str, names: list[str]) -> list[float]:
    """Weight of one source at each position of a text."""
    of_part = np.repeat(np.arange(len(row["lengths"])), row["lengths"])
    part = np.bincount(of_part, row["masses"], len(row["lengths"])) + row["rest"]
    position = np.repeat(np.arange(len(row["parts"])), row["parts"])
    mine = np.where(row["source"] == names.index(name), part, 0.0)
    found: list[float] = np.bincount(position, mine, len(row["parts"])).tolist()
    return found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: np.ones(3), r"gives weights of shape \(3,\); \[sources, positions\] is"),
        (lambda c: np.where(c.aligned, np.nan, 0), "negative or not finite"),
        (lambda c: np.ones(c.aligned.shape), "where it has no distribution"),
        (lambda c: c.aligned * 0.75, "sum to .* at position"),
        ("minse", "function: Input should be 'mince'"),
    ],
)
def test_weights_that_are_none_are_refused(
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    read: dict[str, fusellm.SourceDistributions],
    function: Any,
    message: str,
) -> None:
    with pytest.raises(ArgumentError, match=message):
        fusellm.fuse(TEXTS, target[1], read, function)


def test_sources_that_read_other_texts_are_refused(
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    read: dict[str, fusellm.SourceDistributions],
) -> None:
    for texts, message in (
        (TEXTS[:3], "source neox has read other texts"),
        ([*TEXTS[:3], "other"], "text 3 differs"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fusellm.fuse(texts, target[1], read)
    with pytest.raises(ArgumentError, match="no source to fuse"):
        fusellm.fuse(TEXTS, target[1], {})
    with pytest.raises(ArgumentError, match="sources are a list, where each needs a name"):
        fusellm.fuse(TEXTS, target[1], [read["mpt"]])
    with pytest.raises(ArgumentError, match="source mpt is a str; give what read_distributions"):
        fusellm.fuse(TEXTS, target[1], {"mpt": "zoo/cpp"})
    ends = replace(read["mpt"], last=(False,) * len(TEXTS))
    with pytest.raises(ArgumentError, match="source mpt was read with other ends"):
        fusellm.fuse(TEXTS, target[1], {"neox": read["neox"], "mpt": ends})


def test_a_fused_distribution_is_looked_at(fused: fusellm.FusedDistributions) -> None:
    dataset = fusellm.FusedDataset(fused)
    found = 0
    for text in range(len(fused)):
        block = dataset[text][0]
        for position in range(len(block["ids"]) - 1):
            outcomes = fused.at(text, position)
            if not block["parts"][position]:
                assert outcomes == []
                continue
            found += 1
            assert sum(outcome.mass for outcome in outcomes) <= 1 + 1e-6
            ids = np.concatenate([outcome.ids for outcome in outcomes])
            assert len(set(ids.tolist())) == len(ids)  # of one part, as mince has it
    assert found > 20
    assert "positions have a distribution" in repr(fused)
    for text, position in ((9, 0), (0, 10_000)):
        with pytest.raises(ArgumentError, match="there is no"):
            fused.at(text, position)


# The loss


@pytest.fixture(scope="module")
def batch(fused: fusellm.FusedDistributions) -> dict[str, Any]:
    dataset = fusellm.FusedDataset(fused)
    return fusellm.FusionCollator(dataset)([dataset[n] for n in range(len(dataset))])


def hidden_of(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    mask = batch["attention_mask"]
    found: torch.Tensor = model.base_model(
        batch["input_ids"], attention_mask=mask
    ).last_hidden_state
    return found


def test_the_loss_is_the_trainings_own(
    target: tuple[PreTrainedModel, fusellm.Tokenizer], batch: dict[str, Any]
) -> None:
    """And so are its gradients; labels may be shifted or not."""
    model = target[0]
    teach_objective(model)
    expected = model(**objective_inputs(batch, 0.4))["loss"]
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = fusellm.fusion_loss(
        hidden_of(model, batch), model, batch["labels"], batch["outcomes"], 0.4
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    model.zero_grad()
    hidden = hidden_of(model, batch)[:, :-1]
    moved = fusellm.fusion_loss(
        hidden, model, batch["labels"][:, 1:], batch["outcomes"], 0.4, shifted=True
    )
    torch.testing.assert_close(moved, expected)


def test_without_distributions_it_is_the_models_own_loss(
    target: tuple[PreTrainedModel, fusellm.Tokenizer], batch: dict[str, Any]
) -> None:
    model = target[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = fusellm.fusion_loss(hidden_of(model, batch), model, batch["labels"])
    torch.testing.assert_close(loss, model(**inputs).loss)
    head = model.get_output_embeddings()
    for given, config in ((head, model.config), (Head(head.weight), None)):
        own = fusellm.fusion_loss(hidden_of(model, batch), given, batch["labels"], config=config)
        torch.testing.assert_close(own, loss)


def test_a_head_that_is_not_the_whole_of_it_is_refused(
    batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config)
    ids = torch.arange(12)[None]
    hidden = model.base_model(ids).last_hidden_state
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(fusellm.fusion_loss(hidden, model, ids), expected)
    with pytest.raises(ArgumentError, match="does not say whether its model scales or caps"):
        fusellm.fusion_loss(hidden, model.lm_head, ids)
    with pytest.raises(ArgumentError, match="gemma2 scales or caps its logits"):
        fusellm.fusion_loss(hidden, model.lm_head, ids, config=config)
    monkeypatch.setattr(loss_module, "is_sharded", lambda _: True)
    with pytest.raises(ModelError, match="train with FusionTrainer"):
        fusellm.fusion_loss(hidden, model, ids)


def test_two_processes_have_the_gradients_of_one(
    world: Path,
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    fused: fusellm.FusedDistributions,
    batch: dict[str, Any],
    tmp_path: Path,
) -> None:
    """As the documentation says: hidden states from the wrapped model, and the mean count."""
    model = target[0]
    model.zero_grad()
    fusellm.fusion_loss(
        hidden_of(model, batch), model, batch["labels"], batch["outcomes"], 0.5
    ).backward()
    dataset = fusellm.FusedDataset(fused)
    (tmp_path / "model").symlink_to(world / "llama")
    collate = fusellm.FusionCollator(dataset)
    for rank, rows in enumerate(([0, 1, 2], [3])):
        torch.save(collate([dataset[n] for n in rows]), tmp_path / f"batch-{rank}.pt")
    torch.multiprocessing.spawn(loss_of_two.work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    model.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda_": 1.5}, "lambda is 1.5; it must be a number from 0 to 1"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "labels need one entry a hidden state"),
        ({"hidden": torch.zeros(6, 8), "labels": torch.zeros(6).long()}, "shift them"),
        ({"model_or_head": torch.nn.Embedding(3, 8)}, "this is a Embedding"),
        ({"hidden": "model"}, "hidden is a str, and no tensor"),
        ({"labels": [[1, 2]]}, "labels is a list, and no tensor"),
        ({"beyond": 5000}, "labels have 5000, and the head has rows for 0 to"),
        (
            {"beyond": -1},
            "labels have -1, and the head has rows for 0 to .* and -100 where nothing",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    batch: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    given = {
        "hidden": hidden_of(target[0], batch),
        "model_or_head": target[0],
        "labels": batch["labels"],
        "fused": batch["outcomes"],
    }
    if "beyond" in change:
        labels = batch["labels"].clone()
        labels[0, 2] = change["beyond"]
        change = {"labels": labels}
    with pytest.raises(ArgumentError, match=message):
        fusellm.fusion_loss(**(given | change))
    with pytest.raises(ArgumentError, match="this is a dict; give the model first"):
        fusellm.last_hidden(batch, target[0])
    with pytest.raises(ArgumentError, match="dataset is a list"):
        fusellm.FusionCollator([1, 2])


def test_distributions_of_other_rows_are_refused(
    target: tuple[PreTrainedModel, fusellm.Tokenizer], batch: dict[str, Any]
) -> None:
    hidden = hidden_of(target[0], batch)[:2]
    with pytest.raises(ArgumentError, match="they must be of the same rows"):
        fusellm.fusion_loss(hidden, target[0], batch["labels"][:2], batch["outcomes"])


# Training


def train(
    folder: Path, dataset: fusellm.FusedDataset, model: Any, **others: Any
) -> fusellm.FusionTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = fusellm.FusionTrainer(model, arguments, dataset, **others)
    trainer.train()
    return trainer


def test_a_trainer_in_a_script_of_ones_own(
    world: Path, fused: fusellm.FusedDistributions, tmp_path: Path
) -> None:
    dataset = fusellm.FusedDataset(fused)
    trainer = train(tmp_path, dataset, str(world / "llama"), lambda_=0.5, eval_dataset=dataset)
    losses = [entry for entry in trainer.state.log_history if "clm_loss" in entry]
    assert [entry["lambda"] for entry in losses] == [0.5] * 4
    assert all(entry["fused_share"] > 0.5 for entry in losses)
    assert losses[-1]["loss"] < losses[0]["loss"]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for mine, theirs in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_packed_rows_and_a_schedule(
    world: Path, fused: fusellm.FusedDistributions, tmp_path: Path
) -> None:
    dataset = fusellm.FusedDataset(fused, row_tokens=256)
    assert dataset.packed
    schedule = fusellm.LambdaSchedule(0.5, "linear", 0.9)
    trainer = train(tmp_path, dataset, str(world / "llama"), lambda_=schedule)
    found = [entry["lambda"] for entry in trainer.state.log_history if "lambda" in entry]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f, a, d, m: fusellm.FusionTrainer(m, a, d, lambda_=2), "number from 0 to 1"),
        (lambda f, a, d, m: fusellm.FusionTrainer(m, a, [1, 2]), "give a fusellm.FusedDataset"),
        (lambda f, a, d, m: fusellm.FusedDataset(3), "and this is a int"),
    ],
)
def test_a_training_that_makes_no_sense_is_refused(
    world: Path,
    fused: fusellm.FusedDistributions,
    tmp_path: Path,
    make: Callable[..., Any],
    message: str,
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ArgumentError, match=message):
        make(fused, arguments, fusellm.FusedDataset(fused), str(world / "llama"))


@pytest.mark.parametrize("known_by", ["name", "folder", "cache", "processing_class"])
def test_a_dataset_in_another_tokenizers_ids_is_refused(
    world: Path,
    fused: fusellm.FusedDistributions,
    read: dict[str, fusellm.SourceDistributions],
    tmp_path: Path,
    hub: Path,
    known_by: str,
) -> None:
    """However the model's tokenizer is known; ids that its head has rows for are as wrong."""
    place = str(world / "llama")
    neox = fusellm.Tokenizer.from_pretrained(str(world / "neox"))  # with fewer ids than llama
    others: dict[str, Any] = {}
    model: Any = place
    if known_by == "folder":
        model = AutoModelForCausalLM.from_pretrained(place)
    elif known_by == "cache":
        put_in_cache(hub, world / "llama", FIRST)
        model = AutoModelForCausalLM.from_pretrained("someone/tiny", cache_dir=hub)
    elif known_by == "processing_class":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
        model.config._name_or_path = ""
        others["processing_class"] = fusellm.Tokenizer.from_pretrained(place)
    wrong = fusellm.FusedDataset(fusellm.fuse(TEXTS, neox, read))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ArgumentError, match=r"in the tokens of .*neox.*: id 1 is '!'"):
        fusellm.FusionTrainer(model, arguments, wrong, **others)
    right = fusellm.FusedDataset(fused)
    fusellm.FusionTrainer(model, arguments, right, **others)
    # Who has had the model learn other tokens says so.
    fusellm.FusionTrainer(model, arguments, wrong, processing_class=neox.tokenizer)


def test_a_tokenizer_that_reads_the_same_ids_is_the_models_own(
    world: Path, fused: fusellm.FusedDistributions, tmp_path: Path
) -> None:
    """With a token for padding, or another one before a text."""
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.backend_tokenizer.post_processor = None
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    dataset = fusellm.FusedDataset(fused)
    trainer = fusellm.FusionTrainer(model, arguments, dataset, processing_class=tokenizer)
    assert trainer.processing_class is tokenizer


def test_another_dataset_is_measured_by_its_own_outcomes(
    world: Path,
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    read: dict[str, fusellm.SourceDistributions],
    fused: fusellm.FusedDistributions,
    tmp_path: Path,
) -> None:
    """Of other sources, or packed otherwise: as where it is the dataset that is trained on."""
    other = fusellm.fuse(TEXTS, target[1], {"mpt": read["mpt"]})
    held_out = fusellm.FusedDataset(other, row_tokens=300)
    trainer = train(tmp_path, fusellm.FusedDataset(fused), str(world / "llama"), lambda_=0.0)
    found = trainer.evaluate(held_out)["eval_loss"]
    batch = fusellm.FusionCollator(held_out)([held_out[n] for n in range(len(held_out))])
    with torch.no_grad():
        hidden = fusellm.last_hidden(trainer.model.eval(), batch)
        own = fusellm.fusion_loss(hidden, trainer.model, batch["labels"], batch, 0.0)
    if len(held_out) == 1:
        assert found == pytest.approx(own.item(), rel=1e-5)
    assert trainer.evaluate(held_out)["eval_loss"] == found
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("type", r"eval_dataset.* is a list; give a fusellm\.FusedDataset"),
        ("tokens", "eval_dataset.* is in the tokens of .*neox"),
        ("length", "the longest text of eval_dataset.* has .* tokens, and the model's context is"),
        ("temperature", "the distributions of eval_dataset.* are flattened by temperature 2"),
    ],
)
def test_what_is_measured_is_checked_as_what_is_trained_on(
    world: Path,
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    fused: fusellm.FusedDistributions,
    read: dict[str, fusellm.SourceDistributions],
    tmp_path: Path,
    wrong: str,
    message: str,
    several: bool,
) -> None:
    """Before anything is trained, and where another dataset is measured later."""
    whole = fusellm.FusedDataset(fused)
    dataset = whole.select([int(np.argmin(whole.row_tokens()))])
    model: Any = str(world / "llama")
    other: Any = [1, 2]
    if wrong == "tokens":
        neox = fusellm.Tokenizer.from_pretrained(str(world / "neox"))
        other = fusellm.FusedDataset(fusellm.fuse(TEXTS, neox, read))
    elif wrong == "length":
        model = AutoModelForCausalLM.from_pretrained(world / "llama")
        other = whole
        model.config.max_position_embeddings = dataset.row_tokens()[0]  # others are longer
    elif wrong == "temperature":
        flat = fusellm.fuse(TEXTS, target[1], read, strategy="bytes")
        other = fusellm.FusedDataset(flat, renormalize=True, temperature=2.0)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    given = {"held_out": other} if several else other
    with pytest.raises(ArgumentError, match=message):
        fusellm.FusionTrainer(model, arguments, dataset, eval_dataset=given)
    trainer = fusellm.FusionTrainer(model, arguments, dataset, eval_dataset=dataset)
    for measure in (trainer.evaluate, trainer.predict)[: 1 if several else 2]:
        with pytest.raises(
            ArgumentError, match=message.replace("eval_dataset", "(eval|test)_dataset")
        ):
            measure(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_metrics": len}, "compute_metrics has no logits to look at.* eval_clm_loss"),
        ({"preprocess_logits_for_metrics": max}, "has no logits to look at"),
        ({"compute_loss_func": max}, "compute_loss_func is not known here"),
        ({"args": None}, "args is a NoneType; give transformers' TrainingArguments"),
        ({"args": {"max_steps": 2}}, "args is a dict"),
    ],
)
def test_what_has_no_meaning_for_the_objective_is_refused(
    world: Path,
    fused: fusellm.FusedDistributions,
    tmp_path: Path,
    given: dict[str, Any],
    message: str,
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    everything = {"args": arguments, "train_dataset": fusellm.FusedDataset(fused)} | given
    with pytest.raises(ArgumentError, match=message):
        fusellm.FusionTrainer(str(world / "llama"), **everything)


def test_an_evaluation_has_the_two_losses_each_for_itself(
    world: Path, fused: fusellm.FusedDistributions, tmp_path: Path
) -> None:
    """By which the best checkpoint can be kept: they do not move with λ."""
    dataset = fusellm.FusedDataset(fused)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="clm_loss",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    held_out = {"all": dataset, "one": dataset.select([1])}
    trainer = fusellm.FusionTrainer(
        str(world / "llama"), arguments, dataset, lambda_=0.3, eval_dataset=dataset
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(entry["eval_clm_loss"] for entry in logged)
    for name, rows in held_out.items():
        batch = fusellm.FusionCollator(rows)([rows[n] for n in range(len(rows))])
        with torch.no_grad():
            sums = trainer.model.eval()(**objective_inputs(batch, 0.3))
        measured = trainer.evaluate(held_out)
        for loss, count in (("clm", batch["counts"].predicted), ("fusion", batch["counts"].fused)):
            expected = sums[loss].item() / count
            assert measured[f"eval_{name}_{loss}_loss"] == pytest.approx(expected, rel=1e-5)
    metrics = trainer.predict(dataset).metrics
    assert metrics["test_clm_loss"] == pytest.approx(measured["eval_all_clm_loss"], rel=1e-6)
    assert metrics["test_fusion_loss"] > 0


class Asks(TrainerCallback):
    """Writes on with the model in the midst of its training, and reads with it."""

    def __init__(self, tokenizer: fusellm.Tokenizer) -> None:
        self.tokenizer, self.written = tokenizer, 0

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        ids = torch.from_numpy(self.tokenizer.encode(["the"], [False])[0].ids)[None]
        self.written += model.generate(ids, max_new_tokens=2, do_sample=False).shape[1]
        before = model.training
        fusellm.read_distributions(model, self.tokenizer, TEXTS[:1])
        assert model.training == before


@pytest.mark.parametrize("bf16", [False, True])
def test_the_model_stays_one_that_can_be_called(
    world: Path,
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    fused: fusellm.FusedDistributions,
    tmp_path: Path,
    bf16: bool,
) -> None:
    """By callbacks, between trainings, and in the precision that was asked for each time."""
    model, _ = fusellm.load_pretrained(str(world / "llama"), device="cpu")
    seen: list[bool] = []
    model.get_input_embeddings().register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    dataset = fusellm.FusedDataset(fused)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=bf16, disable_tqdm=True
    )
    trainer = fusellm.FusionTrainer(model, arguments, dataset, eval_dataset=dataset)
    for do in (trainer.evaluate, trainer.train, trainer.evaluate, trainer.train):
        seen.clear()
        do()
        assert seen
        assert set(seen) == {bf16}
    asks = Asks(target[1])
    trainer.add_callback(asks)
    trainer.train()
    assert asks.written > 0
    ids = torch.arange(5, 9)[None]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.equal(twin(ids).logits, model(ids).logits)  # of weights of its own


def test_rows_are_packed_anew_and_chosen(fused: fusellm.FusedDistributions) -> None:
    dataset = fusellm.FusedDataset(fused, row_tokens=2000)
    assert sorted(n for row in dataset.rows for n in row) == [0, 1, 2, 3]
    collate = fusellm.FusionCollator(dataset)
    longest = dataset.longest_text
    assert sorted(n for row in dataset.pack(longest).rows for n in row) == [0, 1, 2, 3]
    assert max(dataset.row_tokens()) == longest
    assert len(dataset.select([0]).rows) == 1
    assert len(dataset.rows) > 1
    plain = fusellm.FusedDataset(fused)
    collate = fusellm.FusionCollator(plain)
    plain.pack(2000)
    assert "position_ids" in collate([plain[0]])


def test_what_is_shown_of_data_is_short(
    fused: fusellm.FusedDistributions, read: dict[str, fusellm.SourceDistributions]
) -> None:
    dataset = fusellm.FusedDataset(fused)
    tokens = sum(dataset.row_tokens())
    assert re.fullmatch(rf"FusedDataset\(4 texts, {tokens} tokens of '.*llama'\)", repr(dataset))
    dataset.pack(2000)
    assert "(4 texts in 1 packed rows, " in repr(dataset)
    block = read["neox"][1]
    expected = f"StoredBlock(1, {len(block.ids)} tokens, {block.positions} distributions)"
    assert repr(block) == expected
    unread = replace(block, usable=False, reason="its distributions are not finite")
    assert repr(unread).endswith("not read: its distributions are not finite)")


def test_rows_that_have_no_room_for_a_text_are_refused(
    fused: fusellm.FusedDistributions,
) -> None:
    dataset = fusellm.FusedDataset(fused)
    short = dataset.longest_text - 1
    message = f"row_tokens is {short}, and the longest text has {short + 1} tokens"
    with pytest.raises(ArgumentError, match=message):
        fusellm.FusedDataset(fused, row_tokens=short)
    with pytest.raises(ArgumentError, match=message):
        dataset.pack(short)
    lengths = dataset.row_tokens()
    others = [n for n, length in enumerate(lengths) if length < max(lengths)]
    assert max(dataset.select(others).pack(short).row_tokens()) <= short
    alone = dataset.pack(short, longer_alone=True)  # as recipes have it
    assert max(alone.row_tokens()) == short + 1


def test_what_does_not_go_together_is_refused(
    world: Path,
    target: tuple[PreTrainedModel, fusellm.Tokenizer],
    fused: fusellm.FusedDistributions,
    read: dict[str, fusellm.SourceDistributions],
    tmp_path: Path,
) -> None:
    model, tokenizer = fusellm.load_pretrained(str(world / "llama"), device="cpu")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    warm = fusellm.Divergence("cross_entropy", 2.0)
    with pytest.raises(ArgumentError, match="flattened by temperature 1"):
        fusellm.FusionTrainer(model, arguments, fusellm.FusedDataset(fused), divergence=warm)
    with pytest.raises(ArgumentError, match="with renormalize=True"):
        fusellm.FusedDataset(fused, temperature=2.0)
    with pytest.raises(ArgumentError, match="model_init is not known"):
        fusellm.FusionTrainer(
            model, arguments, fusellm.FusedDataset(fused), model_init=lambda: model
        )
    for name, values in (("KL", 1.0), ("kl", -2.0)):
        with pytest.raises(ArgumentError):
            fusellm.Divergence(name, values)
    with pytest.raises(ArgumentError, match="'linaer' is no shape"):
        fusellm.LambdaSchedule(0.5, "linaer")
    with pytest.raises(ArgumentError, match="compatibility: paper belongs to strategy"):
        fusellm.fuse(TEXTS, tokenizer, read, compatibility="paper")
    small = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    )
    with pytest.raises(ArgumentError, match="is this tokenizer the model's own"):
        fusellm.bits_per_byte(small, tokenizer, ["the class"])
    with pytest.raises(ArgumentError, match="the model's context is 16"):
        fusellm.FusionTrainer(small, arguments, fusellm.FusedDataset(fused))
    wide = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ArgumentError, match="the target's head has 30"):
        fusellm.FusionTrainer(wide, arguments, fusellm.FusedDataset(fused))
    batch = fusellm.FusionCollator(fusellm.FusedDataset(fused))([fusellm.FusedDataset(fused)[0]])
    hidden = torch.zeros(*batch["labels"].shape, 8)
    with pytest.raises(ArgumentError, match="the target's head has 30 rows"):
        fusellm.fusion_loss(hidden, wide, batch["labels"].clamp(max=29), batch)
    with pytest.raises(ArgumentError, match=r"take them from fusellm\.last_hidden"):
        fusellm.fusion_loss(hidden[..., :4], wide, batch["labels"].clamp(max=29), batch)


def test_numbers_that_are_none_have_no_bits_per_byte(world: Path) -> None:
    model, tokenizer = fusellm.load_pretrained(str(world / "llama"), device="cpu")
    own = model.base_model.forward

    def spoilt(*args: Any, **inputs: Any) -> Any:
        found = own(*args, **inputs)
        found.last_hidden_state[:, 3] = float("nan")
        return found

    assert fusellm.bits_per_byte(model, tokenizer, TEXTS).scored_bytes.tolist() == [
        len(text.encode()) - int(tokenizer.encode([text])[0].ends[0]) for text in TEXTS
    ]
    model.base_model.forward = spoilt
    with pytest.raises(NumericsError, match="NaN or infinity in text 0"):
        fusellm.bits_per_byte(model, tokenizer, TEXTS)


def test_tables_are_plain_wherever_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a notebook, and where colours are forced."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert text_table(["a", "b"], [["1", "2"]]) == "a  b\n1  2"


def test_a_run_says_what_it_does_not_know(world: Path, tmp_path: Path) -> None:
    run = fusellm.Run(world / "recipe.yaml", tmp_path / "run")
    for stage in ("externalize/nope", "train/nope", "fuze"):
        with pytest.raises(ArgumentError, match=f"there is no stage '{stage}'; known: generate"):
            run.execute(stage)
    with pytest.raises(StoreError, match=r"has no finished model yet; first: run.train\(\)"):
        run.model()
    with pytest.raises(ArgumentError, match="models is one name"):
        fusellm.evaluate("zoo/prose", ["smoke"])
    with pytest.raises(ArgumentError, match="device 'auto' is none of torch"):
        fusellm.load_pretrained(world / "llama", device="auto")


def test_a_referee_of_a_recipe_and_in_memory(world: Path, tmp_path: Path) -> None:
    """The target as a referee is read and compared, and teaches nothing; what was read stays."""
    changes = ["sources.1.referee=true"]
    recipe = resolve_paths(fusellm.load_recipe(world / "recipe.yaml"), world)
    plain = fusellm.Run(recipe, tmp_path / "run")
    plain.execute("corpus", "externalize", "fuse")
    read = (tmp_path / "run" / "externalize" / "second" / "manifest.json").stat().st_mtime_ns
    refereed = resolve_paths(fusellm.load_recipe(world / "recipe.yaml", changes), world)
    run = fusellm.Run(refereed, tmp_path / "run")
    run.execute("corpus", "externalize", "fuse", redo=True)
    path = tmp_path / "run" / "externalize" / "second" / "manifest.json"
    assert path.stat().st_mtime_ns == read
    rows = [row[0] for row in fusellm.FusedDataset(run)]
    parts = np.concatenate([row["source"] for row in rows])
    assert set(parts.tolist()) == {0}
    assert sum(int((row["parts"] == 0).sum()) for row in rows) > 0


def test_referees_that_make_no_sense_are_refused(world: Path) -> None:
    every = ["sources.0.referee=true", "sources.1.referee=true"]
    with pytest.raises(FusellmError, match="all are referees; at least one has to teach"):
        fusellm.load_recipe(world / "recipe.yaml", every)
    papers = ["sources.0.referee=true", "fusion.strategy=em", "fusion.compatibility=paper"]
    with pytest.raises(FusellmError, match="paper has no referees"):
        fusellm.load_recipe(world / "recipe.yaml", papers)
    target = fusellm.Tokenizer.from_pretrained(str(world / "llama"))
    model, tokenizer = fusellm.load_pretrained(str(world / "neox"))
    read = {"only": fusellm.read_distributions(model, tokenizer, ["a text"], 4)}
    for referees, why in ((["other"], "'other' is no source; known: only"), (["only"], "all")):
        with pytest.raises(ArgumentError, match=why):
            fusellm.fuse(["a text"], target, read, referees=referees)
