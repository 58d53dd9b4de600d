"""Merging: the real command on tiny models, the arithmetic against slow oracles, refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ggufs
from conftest import Command, code, prose
from fusellm.config import ModelSettings
from fusellm.config.merging import MergeMethod
from fusellm.errors import ArgumentError, FusellmError, ModelError, NumericsError, StoreError
from fusellm.merging import merge as merging
from fusellm.merging import methods, opened
from fusellm.merging.merge import merge_models
from fusellm.merging.settings import METHODS, settings_of
from fusellm.models.load import locate
from fusellm.models.places import zoo_folder
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.identity import Identity
from fusellm.store.manifest import Manifest
from fusellm.zoo.tokenizers import byte_level_bpe, sentencepiece_like_bpe
from hubs import FIRST, put_in_cache

OVER_BASE = [name for name, method in METHODS.items() if method.over_base]
TEXTS = [prose(n) + code(n) for n in range(40)]


def save(folder: Path, seed: int | None = None, *, tied: bool = False, **changes: Any) -> Path:
    """A tiny Llama, the same but for what a seed adds to its weights, as a training would."""
    tokenizer = sentencepiece_like_bpe(iter(TEXTS), 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    config.update(changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base`, and `a`, `b`, `c`, which have learnt something over it."""
    root = tmp_path_factory.mktemp("family")
    save(root / "base")
    for seed, name in enumerate("abc", 1):
        save(root / name, seed)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whatever its files."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def same(one: Path, other: Path, **tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance)


def change(folder: Path, tensor: str, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = by(tensors[tensor])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


# What a user does


def test_the_real_command_makes_a_model_that_generates(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "merged"
    models = [str(family / name) for name in "abc"]
    numbers = ["--base", str(family / "base"), "--method", "ties", "--density", "0.5"]
    arguments = ["merge", *models, *numbers, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "fusellm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"The merged model: {out}\n"
    assert "merging by ties" in ended.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the model reads", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(family / "a").get_vocab()
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["fusellm", "merge"]
    assert "fusellm merge a b c --method ties --base base --weight=1.0 --weight=1.0" in card
    assert "--density=0.5 --lambda=1.0 --out DIR" in card
    assert str(family) not in card
    oracle = {n: [load_file(family / m / "model.safetensors")[n] for m in "abc"] for n in ODD}
    base = load_file(family / "base" / "model.safetensors")
    for name, tensors in oracle.items():
        wanted = slow_ties([t.flatten().tolist() for t in tensors], base[name].flatten().tolist())
        torch.testing.assert_close(weights(out)[name].flatten(), torch.tensor(wanted))


ODD = ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight")


def test_two_models_of_a_run_are_merged_over_its_target(
    world: Path, tmp_path: Path, command: Command
) -> None:
    """A run stands for its fused model, and knows what that was trained from."""
    run = tmp_path / "run"
    recipe = resolve_paths(load_recipe(world / "recipe.yaml"), world)
    pipeline = Pipeline(recipe, run, Silent())
    assert "has no fused model yet; train it with `fusellm run" in told(
        [unfinished(tmp_path / "begun", world), world / "llama"], tmp_path / "none"
    )
    pipeline.execute(("corpus", "externalize", "fuse", "train"))
    clm, out = run / "train" / "clm", tmp_path / "merged"
    arguments = ["merge", run, clm, "--method", "task_arithmetic", "--weight", 1, "--weight", 0]
    code_, answer, errors = command(*arguments, "--out", out, "--json")
    assert code_ == 0, errors
    assert json.loads(answer)["base"] == str(world / "llama")
    assert "the base is" in errors
    same(out, run / "train" / "fused", rtol=0, atol=1e-6)
    assert command("merge", run, clm, "--method", "sce", "--out", tmp_path / "sce")[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "sce")
    assert "none is given; name the model that all were trained from with --base" in told(
        [run, world / "llama"], tmp_path / "other", method="ties"
    )


def unfinished(run: Path, world: Path) -> Path:
    """A run whose training has begun."""
    (run / "train" / "fused").mkdir(parents=True)
    shutil.copy(world / "recipe.yaml", run / "recipe.yaml")
    manifest = Manifest(Identity("train", {}, {}), {})
    (run / "train" / "fused" / "manifest.json").write_bytes(manifest.to_bytes())
    return run


def told(models: Sequence[Path | str], out: Path, **settings: Any) -> str:
    """What a merge is refused with; nothing is left of it."""
    with pytest.raises(FusellmError) as caught:
        merge_models(models, out, **({"method": "linear"} | settings))
    assert not out.exists()
    assert not list(out.parent.glob(".*.merging"))
    return str(caught.value)


def test_a_model_of_the_hub_and_one_of_the_zoo(
    family: Path, tmp_path: Path, hub: Path, command: Command
) -> None:
    put_in_cache(hub, family / "a", FIRST)
    out = tmp_path / "out"
    arguments = ("someone/tiny", family / "a", "--method", "linear", "--out", out)
    assert command("merge", *arguments)[0] == 0
    same(out, family / "a")
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["someone/tiny"]
    assert front["base_model_relation"] == "merge"
    assert FIRST in card
    zoo = copied(zoo_folder("prose"), tmp_path / "prose")
    change(zoo, "model.norm.weight", lambda tensor: 3 * tensor)
    merge_models(["zoo/prose", zoo], tmp_path / "zoo", method="linear")
    norms = (weights(place)["model.norm.weight"] for place in (tmp_path / "zoo", zoo))
    merged, tripled = (norm.float() for norm in norms)
    torch.testing.assert_close(merged, tripled * 2 / 3, rtol=0.01, atol=1e-6)


def test_names_are_shown_in_the_card_as_they_are(family: Path, tmp_path: Path) -> None:
    odd = copied(family / "a", tmp_path / "a|b <img src=x> `*c*`")
    out = merge_models([odd, family / "b"], tmp_path / "out", method="linear").folder
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| a\\|b &lt;img src=x&gt; \\`\\*c\\*\\` | 1 |" in card
    assert "    fusellm merge 'a|b <img src=x> `*c*`' b --method linear" in card


def test_the_methods_of_the_command_are_those_of_the_function() -> None:
    assert list(get_args(MergeMethod)) == list(METHODS)


# What comes out


def test_the_mean_of_equal_models_is_the_model(family: Path, tmp_path: Path) -> None:
    merge_models([family / "a"] * 3, tmp_path / "out", method="linear", weights=[1, 2, 5])
    same(tmp_path / "out", family / "a")


def test_the_mean_of_two(family: Path, tmp_path: Path) -> None:
    models = [family / "a", family / "b"]
    merge_models(models, tmp_path / "out", method="linear", weights=[6, 2])
    a, b = (weights(model) for model in models)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])


@pytest.mark.parametrize(("t", "end"), [(0.0, "a"), (1.0, "b")])
def test_slerp_ends_at_its_models(family: Path, tmp_path: Path, t: float, end: str) -> None:
    merge_models([family / "a", family / "b"], tmp_path / "out", method="slerp", t=t)
    same(tmp_path / "out", family / end, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "sce"])
def test_all_of_what_one_model_has_learnt_is_that_model(
    family: Path, tmp_path: Path, method: str
) -> None:
    """The other one is the base itself, and nothing is left out."""
    models = [family / "a", family / "base"]
    merge_models(models, tmp_path / "out", method=method, base=family / "base", density=1)
    wanted = load_file(family / "a" / "model.safetensors")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def sharded(folder: Path, place: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(place, max_shard_size="8KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    assert len(list(place.glob("*.safetensors"))) > 2
    return place


@pytest.mark.parametrize("method", METHODS)
def test_files_do_not_matter(family: Path, tmp_path: Path, method: str) -> None:
    """Sharded or not, the numbers are the same to the bit, what is drawn too."""
    base = {"base": family / "base"} if method in OVER_BASE else {}
    models = [family / "a", family / "b"]
    merge_models(models, tmp_path / "one", method=method, **base)
    cut = [sharded(family / "a", tmp_path / "a"), family / "b"]
    merge_models(cut, tmp_path / "several", method=method, **base)
    names = {path.name for path in (tmp_path / "several").glob("*.safetensors*")}
    assert names == {path.name for path in (tmp_path / "a").glob("*.safetensors*")}
    same(tmp_path / "one", tmp_path / "several", rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    merged, first = weights(tmp_path / "one"), weights(family / "a")
    assert any(not torch.equal(merged[name], first[name]) for name in merged)


def test_a_seed_decides_what_is_drawn(family: Path, tmp_path: Path) -> None:
    models, settings = (
        [family / "a", family / "b"],
        {"method": "dare_linear", "base": family / "base"},
    )
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        merge_models(models, tmp_path / name, seed=seed, **settings)
    same(tmp_path / "one", tmp_path / "again", rtol=0, atol=0)
    with pytest.raises(AssertionError):
        same(tmp_path / "one", tmp_path / "other")


def halved(folder: Path, place: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(place)
    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    return place


def test_the_precision_is_the_bases_and_computed_in_float32(family: Path, tmp_path: Path) -> None:
    base = halved(family / "base", tmp_path / "base")
    models, out = [family / "a", family / "b"], tmp_path / "out"
    merge_models(models, out, method="task_arithmetic", base=base)
    a, b = (weights(model) for model in models)
    for name, under in weights(base).items():
        wanted = a[name] + b[name] - under.float()
        merged = weights(out)[name]
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged, wanted.to(torch.bfloat16), rtol=0.01, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    merge_models(
        [halved(family / "a", tmp_path / "a"), family / "b"], tmp_path / "c", method="slerp"
    )
    assert {tensor.dtype for tensor in weights(tmp_path / "c").values()} == {torch.bfloat16}


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    models = [save(tmp_path / name, seed, tied=True) for seed, name in enumerate("ab", 1)]
    merge_models(models, tmp_path / "out", method="linear")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_stored_copy_of_a_tied_head_counts_for_nothing(tmp_path: Path) -> None:
    models = [save(tmp_path / name, seed, tied=True) for seed, name in enumerate("ab", 1)]
    tensors = load_file(models[1] / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, models[1] / "model.safetensors", metadata={"format": "pt"})
    merge_models(models, tmp_path / "out", method="linear")
    assert "lm_head.weight" not in weights(tmp_path / "out")


@pytest.mark.parametrize("order", ["tied first", "tied last"])
def test_a_head_that_one_model_has_for_itself_becomes_one(
    family: Path, tmp_path: Path, order: str
) -> None:
    """As after a training of adapters on the head."""
    tied, own = save(tmp_path / "tied", 1, tied=True), family / "b"
    models = [tied, own] if order == "tied first" else [own, tied]
    merge_models(models, tmp_path / "out", method="linear")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding, head = weights(tied)["model.embed_tokens.weight"], weights(own)["lm_head.weight"]
    torch.testing.assert_close(model.lm_head.weight.data, (embedding + head) / 2)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_old_names_and_buffers_of_gpt_2(tmp_path: Path) -> None:
    """The hub's GPT-2 calls `h.0` what a training saves as `transformer.h.0`."""
    tokenizer = byte_level_bpe(iter(TEXTS), 350)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=2, eos_token_id=0
    )
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    new = load_file(tmp_path / "old" / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in new.items()}
    assert old.keys() != new.keys()
    old["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    merge_models([tmp_path / "old", tmp_path / "new"], tmp_path / "out", method="linear")
    other = load_file(tmp_path / "new" / "model.safetensors")
    merged = weights(tmp_path / "out")
    assert merged.keys() == new.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (new[name] + other[name]) / 2)


def test_what_is_no_float_has_to_be_equal(family: Path, tmp_path: Path) -> None:
    models = [copied(family / name, tmp_path / name) for name in "ab"]
    for model in models:
        tensors = load_file(model / "model.safetensors") | {"model.steps": torch.tensor([7])}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    merge_models(models, tmp_path / "out", method="linear")
    assert torch.equal(weights(tmp_path / "out")["model.steps"], torch.tensor([7]))
    change(models[1], "model.steps", lambda steps: steps + 1)
    assert "model.steps is I64 and not equal" in told(models, tmp_path / "unequal")


def test_of_each_model_one_tensor_is_in_memory(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, alive = opened.Opened.read, list[tuple[str, weakref.ref[torch.Tensor]]]()
    most = [0]

    def read(self: opened.Opened, tensor: str) -> torch.Tensor:
        assert {name for name, values in alive if values() is not None} <= {tensor}
        values = own(self, tensor)
        alive.append((tensor, weakref.ref(values)))
        most[0] = max(most[0], sum(one() is not None for _, one in alive))
        return values

    monkeypatch.setattr(opened.Opened, "read", read)
    models = [sharded(family / "a", tmp_path / "a"), family / "b"]
    merge_models(models, tmp_path / "out", method="sce", base=family / "base")
    assert most == [3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_a_merge_that_is_stopped_leaves_nothing(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    own, count, out = merging.merge_tensors, [0], tmp_path / "out"

    def dying(*given: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == 5:
            assert list(tmp_path.glob(".out.merging/model.safetensors"))
            raise error(28, "No space left on device")
        return own(*given)

    monkeypatch.setattr(merging, "merge_tensors", dying)
    models = [family / "a", family / "b"]
    with pytest.raises(StoreError if error is OSError else error):
        merge_models(models, out, method="linear")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".out.merging").mkdir()  # of a kill, which can remove nothing
    (tmp_path / ".out.merging" / "model.safetensors").write_bytes(b"half")
    out.mkdir()
    merge_models(models, out, method="linear")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The arithmetic against slow oracles


def slow_ties(
    models: Sequence[Sequence[float]], base: Sequence[float], density: float = 0.5
) -> list[float]:
    """Equal weights, λ = 1; no two magnitudes of a model are equal."""
    changes = []
    for model in models:
        change_ = [value - under for value, under in zip(model, base, strict=True)]
        order = sorted(range(len(change_)), key=lambda n: -abs(change_[n]))
        kept = set(order[: max(1, round(density * len(order)))])
        changes.append([value if n in kept else 0.0 for n, value in enumerate(change_)])
    return [
        under + slow_agreeing([change_[n] for change_ in changes], [1.0] * len(models), None)
        for n, under in enumerate(base)
    ]


def slow_agreeing(
    values: Sequence[float], shares: Sequence[float], by: Sequence[float] | None
) -> float:
    total = sum(value * share for value, share in zip(values, by or shares, strict=True))
    agreeing = [(v, w) for v, w in zip(values, shares, strict=True) if v * total > 0]
    if not agreeing:
        return 0.0
    return sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing)


def slow_sce(
    models: Sequence[Sequence[float]], base: Sequence[float], density: float
) -> list[float]:
    changes = [[v - under for v, under in zip(model, base, strict=True)] for model in models]
    columns = list(zip(*changes, strict=True))
    means = [sum(column) / len(column) for column in columns]
    variances = [
        sum((v - mean) ** 2 for v in column) for column, mean in zip(columns, means, strict=True)
    ]
    varied = [n for n, column in enumerate(columns) if len(set(column)) > 1]
    varied.sort(key=lambda n: -variances[n])
    kept = set(varied[: max(1, round(density * len(varied)))])
    if density == 1:
        kept = set(range(len(base)))
    columns = [column if n in kept else (0.0,) * len(column) for n, column in enumerate(columns)]
    squares = [sum(column[m] ** 2 for column in columns) for m in range(len(models))]
    shares = [square / sum(squares) for square in squares]
    ones = [1.0] * len(models)
    return [u + slow_agreeing(c, shares, ones) for u, c in zip(base, columns, strict=True)]


def made(seed: int, models: int, entries: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Some models and their base; two fifths of the entries are alike in all of them.

    Half of those are the base's, and half have learnt the same.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(entries, generator=generator)
    tensors = [base + torch.randn(entries, generator=generator) for _ in range(models)]
    for tensor in tensors:
        tensor[::5], tensor[1::5] = base[::5], tensors[0][1::5]
    return tensors, base


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.8])
def test_ties_and_sce_are_what_plain_python_makes(seed: int, density: float) -> None:
    tensors, base = made(seed, 2 + seed % 3, 43)
    rows, under = [tensor.tolist() for tensor in tensors], base.tolist()
    ones = [1.0] * len(rows)
    merged = methods.ties(tensors, base, ones, density, 1.0)
    torch.testing.assert_close(merged, torch.tensor(slow_ties(rows, under, density)))
    merged = methods.sce(tensors, base, density)
    torch.testing.assert_close(merged, torch.tensor(slow_sce(rows, under, density)))
    merged = methods.sce(tensors, base, 1.0)
    torch.testing.assert_close(merged, torch.tensor(slow_sce(rows, under, 1)))
    assert not torch.equal(merged, base)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("seed", range(6))
def test_dare_is_what_plain_python_makes(seed: int) -> None:
    tensors, base = made(seed, 3, 41)
    density, shares = 0.4, [1.0, 0.5, 2.0]
    kept = [(torch.rand(41, generator=one) < density).tolist() for one in seeds(1, 2, 3)]
    columns = [
        [(float(tensors[m][n] - base[n]) / density if kept[m][n] else 0.0) for m in range(3)]
        for n in range(41)
    ]
    sums = [sum(w * v for w, v in zip(shares, column, strict=True)) for column in columns]
    merged = methods.dare_linear(tensors, base, shares, density, 0.5, seeds(1, 2, 3))
    torch.testing.assert_close(merged, base + 0.5 * torch.tensor(sums))
    means = [slow_agreeing(column, shares, None) for column in columns]
    merged = methods.dare_ties(tensors, base, shares, density, 0.5, seeds(1, 2, 3))
    torch.testing.assert_close(merged, base + 0.5 * torch.tensor(means))


def test_dare_is_unbiased() -> None:
    """Over many seeds its mean is what task arithmetic makes, within five standard errors."""
    tensors, base = made(0, 2, 30)
    density, draws = 0.25, 4000
    total, squares = torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for seed in range(draws):
        merged = methods.dare_linear(
            tensors, base, [1, 1], density, 1.0, seeds(2 * seed, 2 * seed + 1)
        ).double()
        total, squares = total + merged, squares + merged**2
    mean = total / draws
    error = ((squares / draws - mean**2).clamp(min=0) / draws).sqrt()
    wanted = methods.task_arithmetic(tensors, base, [1, 1], 1.0).double()
    assert ((mean - wanted).abs() <= 5 * error + 1e-5).all()
    assert error.max() < 0.2  # so that this can fail


def test_models_of_one_merge_draw_apart() -> None:
    settings = settings_of("dare_linear", 2, density=0.5)
    ones, base = [torch.ones(64)] * 2, torch.zeros(64)
    merged = methods.merge_tensors(settings, ones, base, "a")
    assert set(merged.tolist()) == {0.0, 2.0, 4.0}
    assert not torch.equal(merged, methods.merge_tensors(settings, ones, base, "b"))
    assert torch.equal(merged, methods.merge_tensors(settings, ones, base, "a"))


@pytest.mark.parametrize("method", OVER_BASE)
def test_what_is_learnt_turned_round_is_merged_turned_round(method: str) -> None:
    """No sign goes before the other, not where models cancel each other either."""
    tensors, _ = made(1, 3, 40)
    tensors[0][:3], tensors[1][:3], tensors[2][:3] = 1.0, -1.0, 0.0
    zero, settings = torch.zeros(40), settings_of(method, 3)
    merged = methods.merge_tensors(settings, tensors, zero, "a")
    turned = methods.merge_tensors(settings, [-tensor for tensor in tensors], zero, "a")
    torch.testing.assert_close(turned, -merged)
    assert merged.any()


def test_weights_count_by_their_proportions_or_by_their_size() -> None:
    tensors, base = made(2, 2, 20)
    for double in (
        lambda w: methods.linear(tensors, w),
        lambda w: methods.ties(tensors, base, w, 0.5, 1.0),
    ):
        torch.testing.assert_close(double([1.0, 3.0]), double([2.0, 6.0]))
        assert not torch.allclose(double([1.0, 3.0]), double([3.0, 1.0]))
    once = methods.task_arithmetic(tensors, base, [1.0, 3.0], 1.0)
    twice = methods.task_arithmetic(tensors, base, [2.0, 6.0], 1.0)
    torch.testing.assert_close(twice - base, 2 * (once - base))
    torch.testing.assert_close(methods.task_arithmetic(tensors, base, [2.0, 6.0], 0.5), once)


@pytest.mark.parametrize("angle", [1e-6, 1e-3, 0.5, 3.0])
def test_slerp_goes_along_the_arc(angle: float) -> None:
    ends = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.2, 0.2 + angle)]
    for t in (0.25, 0.5, 0.9):
        there = 0.2 + t * angle
        wanted = torch.tensor([math.cos(there), math.sin(there)])
        torch.testing.assert_close(methods.slerp(ends, t), wanted, rtol=0, atol=1e-6)


def test_slerp_without_an_arc_takes_the_chord() -> None:
    one, zero = torch.tensor([2.0, 0.0]), torch.zeros(2)
    torch.testing.assert_close(methods.slerp([one, zero], 0.25), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(methods.slerp([one, -one], 0.25), torch.tensor([1.0, 0.0]))


def test_nothing_that_is_given_is_changed() -> None:
    tensors, base = made(3, 2, 20)
    before = [tensor.clone() for tensor in (*tensors, base)]
    for method in METHODS:
        methods.merge_tensors(settings_of(method, 2), tensors, base, "a")
    assert all(map(torch.equal, before, (*tensors, base)))


# What is refused


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (1, {}, "one model is named, and a merge is of two or more"),
        (2, {"method": "median"}, "there is no method 'median'; there are linear, slerp"),
        (2, {"weights": [1]}, "1 weights are given (1) for 2 models; give one for each"),
        (2, {"weights": [1, -1]}, "the weights 1, -1 sum to 0, and linear divides by their sum"),
        (2, {"weights": [1, math.nan]}, "the weights 1, nan are not all numbers"),
        (2, {"method": "ties", "weights": [2, -1]}, "are not all 0 or more, and ties takes a mean"),
        (2, {"method": "ties", "density": 0}, "density 0 is not in (0, 1]"),
        (2, {"method": "sce", "density": 1.5}, "density 1.5 is not in (0, 1]"),
        (2, {"method": "ties", "density": math.nan}, "density nan is not in (0, 1]"),
        (2, {"density": 0.5}, "density has no meaning with linear; it belongs to ties, dare_"),
        (2, {"method": "sce", "weights": [1, 1]}, "a weight has no meaning with sce"),
        (2, {"method": "slerp", "scale": 1}, "lambda has no meaning with slerp"),
        (2, {"method": "ties", "seed": 1}, "seed has no meaning with ties; it belongs to dare_"),
        (3, {"method": "slerp"}, "slerp goes from one model to another, and 3 are named"),
        (2, {"method": "slerp", "t": 1.5}, "t 1.5 is not in [0, 1]"),
        (2, {"method": "ties", "scale": math.inf}, "lambda inf is no number"),
        (2, {"method": "dare_ties", "seed": -1}, "seed -1 is below 0"),
        (2, {"method": "ties"}, "name the model that all were trained from with --base"),
        (2, {"base": "zoo/prose"}, "--base zoo/prose has no meaning with linear"),
    ],
)
def test_wrong_numbers_are_told_before_any_model_is_looked_for(
    tmp_path: Path, models: int, settings: dict[str, Any], message: str
) -> None:
    nowhere = [str(tmp_path / "nowhere")] * models
    with pytest.raises(ArgumentError) as caught:
        merge_models(nowhere, tmp_path / "out", **({"method": "linear"} | settings))
    assert message in str(caught.value)


def test_the_command_tells_wrong_numbers_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom fusellm.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 1, stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    arguments = ["merge", "a", "b", "--method", "ties", "--density", "7", "--out", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("fusellm: density 7 is not in (0, 1]")


def test_models_of_two_kinds_are_refused(family: Path, world: Path, tmp_path: Path) -> None:
    out, a = tmp_path / "out", family / "a"
    message = told([a, world / "neox"], out)
    assert "is a LlamaForCausalLM and " in message
    assert "neox a GPTNeoXForCausalLM; a merge is of models of one architecture" in message
    wide = save(tmp_path / "wide", 1, intermediate_size=32)
    message = told([a, wide], out)
    assert message.startswith("model.layers.0.mlp.down_proj.weight is 16 × 24 in ")
    assert "and 16 × 32 in " in message
    short = save(tmp_path / "short", 1, num_hidden_layers=1)
    message = told([short, a], out)
    assert "short has no tensor model.layers.1." in message
    heads = copied(a, tmp_path / "heads")
    reconfigure(heads, num_attention_heads=4, num_key_value_heads=4, head_dim=4)
    assert "num_attention_heads of " in told([a, heads], out)
    assert "is 2 and of " in told([a, heads], out)


def test_what_may_be_meant_is_said(family: Path, tmp_path: Path, command: Command) -> None:
    other = copied(family / "b", tmp_path / "other")
    reconfigure(other, rms_norm_eps=1e-3)
    arguments = ("merge", family / "a", other, "--method", "linear", "--out", tmp_path / "out")
    code_, _, errors = command(*arguments)
    assert code_ == 0
    assert (
        f"note: rms_norm_eps of {family / 'a'} is 1e-06 and of {other} 0.001; the merged" in errors
    )


def test_other_tokenizers_are_refused(family: Path, tmp_path: Path) -> None:
    other = copied(family / "b", tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, two = "a", "b"
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    message = told([family / "a", other], tmp_path / "out")
    ids = sorted((vocabulary[one], vocabulary[two]))
    assert f"different tokenizers: 'a' has the id {ids[0]} in the one and {ids[1]} in" in message
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    tokenizer["normalizer"] = {"type": "NFKC"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "cut by other rules" in told([family / "a", other], tmp_path / "out")


def test_what_is_put_around_a_text_may_differ(family: Path, tmp_path: Path) -> None:
    """As where a recipe's `prefix` says otherwise; the result keeps to the first model's."""
    bare = copied(family / "a", tmp_path / "bare")
    path = bare / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    merge_models([bare, family / "b"], tmp_path / "out", method="linear")
    lengths = [
        len(AutoTokenizer.from_pretrained(place)("the model")["input_ids"])
        for place in (bare, tmp_path / "out", family / "b")
    ]
    assert lengths[0] == lengths[1] == lengths[2] - 1


def test_a_missing_tensor_is_named(family: Path, tmp_path: Path) -> None:
    torn = copied(family / "b", tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    assert "torn lacks weights that its configuration asks for (model.norm.weight)" in told(
        [family / "a", torn], tmp_path / "out"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["model", "base"])
def test_a_tensor_that_is_no_number_is_named(
    family: Path, tmp_path: Path, value: float, place: str
) -> None:
    broken = copied(family / "b", tmp_path / "broken")
    change(broken, ODD[1], lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    models = [family / "a", broken] if place == "model" else [family / "a", family / "b"]
    base = family / "base" if place == "model" else broken
    message = told(models, tmp_path / "out", method="ties", base=base)
    assert message.startswith(f"{ODD[1]} of {broken} (model.safetensors) has 16 entries of 256")


def test_a_result_that_is_no_number_is_refused(family: Path, tmp_path: Path) -> None:
    base = halved(family / "base", tmp_path / "half", torch.float16)
    models = [family / "a", family / "b"]
    with pytest.raises(NumericsError, match=r"would be infinite in F16; take smaller weights"):
        merge_models(models, tmp_path / "out", method="task_arithmetic", base=base, scale=1e7)


def test_what_has_no_plain_tensors_is_refused_with_the_cure(family: Path, tmp_path: Path) -> None:
    import peft

    out = tmp_path / "out"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapters")
    message = told([family / "a", tmp_path / "adapters"], out)
    assert "holds adapters" in message
    assert f"fusellm.load_pretrained({str(tmp_path / 'adapters')!r})" in message
    quantized = copied(family / "b", tmp_path / "quantized")
    reconfigure(quantized, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is stored quantized (gptq)" in told([family / "a", quantized], out)
    own = copied(family / "b", tmp_path / "own")
    reconfigure(own, auto_map={"AutoModelForCausalLM": "own.Own"})
    assert "comes with code of its own" in told([family / "a", own], out)
    pickled = copied(family / "b", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "weights as pickles only" in told([family / "a", pickled], out)
    assert "there is no model folder" in told([family / "a", "./nothing"], out)


def test_a_gguf_file_is_refused_with_the_cure(family: Path, tmp_path: Path) -> None:
    vocabulary = ggufs.byte_level("smollm")
    model = ggufs.tiny("llama", vocabulary.rows)
    path = ggufs.write(tmp_path / "a.gguf", model, vocabulary.fields)
    message = told([family / "b", path], tmp_path / "out")
    assert message.startswith(f"{path} is a GGUF file, whose weights are not plain tensors; save")
    assert f"fusellm.load_pretrained({str(path)!r})" in message


def test_a_place_that_is_taken_is_refused_first(family: Path, tmp_path: Path) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    file.write_text("mine")
    models = [family / "a", "./nothing"]
    with pytest.raises(StoreError, match="is there already and is not empty; give another --out"):
        merge_models(models, taken, method="linear")
    with pytest.raises(StoreError, match="is a file; give the name of a folder"):
        merge_models(models, file, method="linear")
    assert (taken / "mine").read_text() == file.read_text() == "mine"


def test_one_process_writes_at_a_time(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, out, own = [family / "a", family / "b"], tmp_path / "out", merging.merge_tensors
    messages = []

    def again(*given: Any) -> torch.Tensor:
        monkeypatch.setattr(merging, "merge_tensors", own)
        with pytest.raises(StoreError) as caught:
            merge_models(models, out, method="linear")
        messages.append(str(caught.value))
        return own(*given)

    monkeypatch.setattr(merging, "merge_tensors", again)
    merge_models(models, out, method="linear")
    assert messages == [f"another process is writing in {out}; wait for it or stop it"]
    same(out, merge_models(models, tmp_path / "more", method="linear").folder)


def test_a_disk_that_is_too_small_is_told_first(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "the merged model needs 0.0 GB and" in told(
        [family / "a", family / "b"], tmp_path / "out"
    )


def test_files_are_laid_out_as_safetensors_wants_them(family: Path, tmp_path: Path) -> None:
    """Every tensor begins at a multiple of its width, whatever types are mixed."""
    models = [copied(family / name, tmp_path / name) for name in "ab"]
    for model in models:
        change(model, "model.norm.weight", lambda tensor: tensor[:15].half())
        change(model, ODD[1], lambda tensor: tensor.bfloat16())
        reconfigure(model, hidden_size=16)
    with pytest.raises(ModelError, match=r"model.norm.weight of .* is 15, and by its config.json"):
        merge_models(models, tmp_path / "out", method="linear")
    for model in models:
        tensors = load_file(model / "model.safetensors")
        tensors |= {"a.odd": torch.ones(3).half(), "model.norm.weight": torch.ones(16)}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    merge_models(models, tmp_path / "out", method="linear")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    width = {"F32": 4, "F16": 2, "BF16": 2}
    spans = [(t["data_offsets"][0], width[t["dtype"]]) for n, t in header.items() if n[0] != "_"]
    assert {width for _, width in spans} == {2, 4}
    assert all(begin % width == 0 for begin, width in spans)


@pytest.mark.parametrize("several", [False, True])
def test_what_is_not_in_the_cache_is_fetched(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """From a hub that is a folder here: one file, or the index and then its files."""
    there = sharded(family / "a", tmp_path / "a") if several else family / "a"
    asked = []

    def download(place: str, name: str, revision: str) -> str:
        asked.append((place, revision))
        if not (there / name).is_file():
            raise LocalEntryNotFoundError(name)
        return str(there / name)

    monkeypatch.setattr(opened, "hf_hub_download", download)
    located = locate(ModelSettings(model=str(family / "a")))
    at_hub = replace(located, place="someone/tiny", commit=FIRST)
    files = opened._files(at_hub)
    assert set(files) == {path.name for path in there.glob("*.safetensors")}
    assert set(asked) == {("someone/tiny", FIRST)}
    there = tmp_path
    with pytest.raises(ModelError, match=r"could not be fetched from the hub: .*check the conn"):
        opened._files(at_hub)
