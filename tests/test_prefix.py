"""What a tokenizer puts before a text, from recipe to results: read, and never predicted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import worlds
from conftest import code, prose
from fusellm.config import ModelSettings
from fusellm.errors import IdentityError, ModelError, RecipeError
from fusellm.models.load import load_tokenizer, locate
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.externalized import layout_of, open_externalized
from fusellm.store.tables import Shard
from fusellm.tokens.encode import Encoder
from fusellm.training.collator import Collator
from fusellm.training.rows import Rows, StoredBlocks
from fusellm.zoo.tokenizers import byte_level_bpe
from stores import clm_rows

CHANGES = (
    "target.model=glm",
    "sources.0.model=glm",
    "sources.1.model=llama",
    "corpus.train_bytes=6000",
    "training.max_steps=2",
    "training.validations=1",
)


@pytest.fixture(scope="module")
def glm(world: Path) -> Path:
    """A tiny model whose tokenizer puts two tokens before a text, and EOS after it."""
    texts = [prose(n) + code(n) for n in range(40)]
    base = byte_level_bpe(iter(texts), 400)
    tokenizer = worlds.putting(base, worlds.PREFIX, ["<|endoftext|>"])
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(world / "glm")
    tokenizer.save_pretrained(world / "glm")
    return world / "glm"


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    recipe = load_recipe(world / "recipe.yaml", (*CHANGES, *changes))
    return Pipeline(resolve_paths(recipe, world), run, Silent())


@pytest.fixture(scope="module")
def finished(world: Path, glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "glm"
    pipeline(world, run).execute()
    return run


def prefix_ids(glm: Path) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(glm).convert_tokens_to_ids([*worlds.PREFIX])
    return found


@pytest.mark.parametrize("name", ["target", "first"])
def test_every_block_of_a_store_begins_with_it(finished: Path, glm: Path, name: str) -> None:
    folder = open_externalized(finished, name)
    for shard in (Shard(folder, one, layout_of(folder)) for one in folder.shards):
        for row in range(len(shard)):
            block = shard.block(row)
            assert block["ids"][:2].tolist() == prefix_ids(glm)
            assert block["bytes"][:2].tolist() == [0, 0]
            assert block["bytes"][2] > 0


def test_positions_are_counted_without_it(finished: Path) -> None:
    """Those that predict text or EOS: a block of T tokens, two of them put, has T − 2."""
    target = open_externalized(finished, "target")
    found = json.loads((finished / "fuse" / "counts.json").read_text())["domains"].values()
    tokens, blocks = target.counts["tokens"], sum(domain["blocks"] for domain in found)
    assert sum(domain["positions"] for domain in found) == tokens - 2 * blocks
    for domain in found:
        first = domain["sources"]["first"]
        assert sum(first["situations"].values()) == domain["positions"]
        # The target's twin has read the same at every position that predicts text.
        assert first["situations"]["unaligned"] == 0
        assert domain["without_source"] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_training_reads_it_and_does_not_predict_it(finished: Path, glm: Path, packed: bool) -> None:
    rows = clm_rows(finished, open_corpus(finished), prefix_tokens=2)
    blocks = [rows[n][0] for n in range(3)]
    batch = Collator(None, packed)([blocks] if packed else [[block] for block in blocks])
    ids, labels = batch["input_ids"].numpy().ravel(), batch["labels"].numpy().ravel()
    is_prefix = np.isin(ids, prefix_ids(glm))
    assert is_prefix.sum() == 2 * len(blocks)
    assert (labels[is_prefix] == -100).all()
    expected = sum(len(block["ids"]) - 2 for block in blocks)
    assert (labels != -100).sum() == batch["counts"].predicted == expected


def test_a_block_of_nothing_else_is_no_row(finished: Path) -> None:
    folder = open_externalized(finished, "target")
    names = [name for name in folder.shards if name.startswith("train-")]
    whole = Rows(StoredBlocks(folder, layout_of(folder), names, prefix_tokens=2))
    longest = int(whole.lengths.max())
    assert len(Rows(StoredBlocks(folder, layout_of(folder), names, prefix_tokens=longest))) == 0
    assert len(whole) == len(whole.lengths)


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_model_on_what_its_own_tokenizer_gives(
    finished: Path, glm: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(glm).eval()
    tokenizer = AutoTokenizer.from_pretrained(glm)
    nats: dict[str, float] = {}
    size: dict[str, int] = {}
    for block in read_part(open_corpus(finished), "held_out"):
        ids = torch.tensor(tokenizer(block.text)["input_ids"][:-1])  # without its EOS
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        own = log_p[1:-1].gather(1, ids[2:, None])  # what comes after `[gMASK] <sop>`
        nats[block.domain] = nats.get(block.domain, 0.0) - float(own.sum())
        size[block.domain] = size.get(block.domain, 0) + len(block.text.encode())
    records = json.loads((finished / "evaluate" / "results.json").read_text())["records"]
    found = {r["task"]: r["value"] for r in records if r["model"] == "target"}
    for domain, total in nats.items():
        assert found[domain] == pytest.approx(total / size[domain] / np.log(2), rel=1e-5)


def test_the_papers_alignment_pairs_the_last_tokens_that_are_put(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    """Of two that put two and one: at the first position of text each has read nothing."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    pipeline(world, run, "fusion.strategy=em").execute(["fuse"], redo=True)
    found = json.loads((run / "fuse" / "counts.json").read_text())["domains"].values()
    for domain in found:
        assert domain["sources"]["first"]["aligned"] == domain["positions"]
        assert 0 < domain["sources"]["second"]["aligned"] <= domain["positions"]


# What a recipe says instead


@pytest.mark.parametrize("prefix", [[], ["<sop>"], ["<|endoftext|>", "[gMASK]"]])
def test_a_recipe_can_say_what_is_put(glm: Path, tmp_path: Path, prefix: list[str]) -> None:
    settings = ModelSettings(model=str(glm), prefix=prefix)
    tokenizer = load_tokenizer(locate(settings))
    ids = tokenizer.convert_tokens_to_ids(prefix)
    assert list(Encoder(tokenizer).vocabulary.prefix_ids) == ids
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][:-1] == ids


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("prefix", [[], ["</s>", "<s>"]])
def test_what_is_put_is_saved_whatever_the_tokenizer_was_built_from(
    world: Path, tmp_path: Path, settings: dict[str, bool], prefix: list[str]
) -> None:
    """transformers builds templates of its own from `add_bos_token`, and Llama's class as well."""
    llama = tmp_path / "llama"
    shutil.copytree(world / "llama", llama)
    config = json.loads((llama / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizerFast"} | settings
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    located = locate(ModelSettings(model=str(llama), prefix=prefix))
    tokenizer = load_tokenizer(located)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Encoder(AutoTokenizer.from_pretrained(tmp_path / "saved"))
    assert again.tokenizer.convert_ids_to_tokens([*again.vocabulary.prefix_ids]) == prefix


def test_a_token_that_there_is_not_cannot_be_put(glm: Path) -> None:
    located = locate(ModelSettings(model=str(glm), prefix=["<bos>"]))
    with pytest.raises(ModelError, match=r"has no token '<bos>'; special .*\[gMASK\]"):
        load_tokenizer(located)


def test_another_prefix_is_another_identity(world: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="tokenizer"):
        pipeline(world, finished, "sources.0.prefix=[]").execute(["externalize"])
    with pytest.raises(RecipeError, match="prefix"):
        pipeline(world, tmp_path, "sources.0.prefix=<sop>")
