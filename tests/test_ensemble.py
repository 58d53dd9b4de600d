"""Several models as one at inference, against a slow oracle that writes out every distribution."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusellm
from conftest import code, prose
from fusellm import Ensemble
from fusellm.errors import ArgumentError
from fusellm.evaluation.text.nats import blocks_nats

TEXTS = [code(3)[:150], prose(5)[:120], "naïve – 🙂🙂 = 12345;\n", prose(1000)[:90]]
LAST = [True, False, True, False]
Loaded = tuple[Any, fusellm.Tokenizer]


@pytest.fixture(scope="module")
def models(world: Path) -> dict[str, Loaded]:
    return {
        name: fusellm.load_pretrained(str(world / name), device="cpu")
        for name in ("llama", "neox", "mpt")
    }


@torch.no_grad()
def after(loaded: Loaded, ids: np.ndarray) -> np.ndarray:
    """[T, V] what comes after each token, by the model itself."""
    logits = loaded[0](input_ids=torch.from_numpy(ids)[None]).logits[0]
    return torch.softmax(logits.double(), dim=-1).numpy()


def in_tokens_of(target: Loaded, source: Loaded, own: np.ndarray, said: np.ndarray) -> np.ndarray:
    """[Vt] a source's distribution, each class divided as the target divides it."""
    map_ = fusellm.vocabulary_map(source[1], target[1])
    by_class: dict[int, float] = {}
    for id_, class_ in enumerate(map_.outcome_of_source.tolist()):
        by_class[class_] = by_class.get(class_, 0.0) + said[id_]
    classes = map_.outcome_of_target.tolist()
    whole: dict[int, float] = {}
    for id_, class_ in enumerate(classes):
        whole[class_] = whole.get(class_, 0.0) + own[id_]
    there = sum(mass for c, mass in by_class.items() if c in whole)
    return np.array(
        [by_class.get(c, 0.0) / there * own[v] / whole[c] for v, c in enumerate(classes)]
    )


def members_at(
    target: Loaded, sources: list[Loaded], text: str, last: bool
) -> Iterator[tuple[int, list[np.ndarray | None]]]:
    """The true next token of each position, and what each member says; None where it sleeps."""
    (block,) = target[1].encode([text], [last])
    own = after(target, block.ids)
    readings = []
    for source in sources:
        (read,) = source[1].encode([text], [last])
        by_end = {end: j for j, end in enumerate(read.ends.tolist()[:-1])}
        readings.append((by_end, after(source, read.ids)))
    ends = block.ends.tolist()
    for i, (end, following) in enumerate(pairwise(ends)):
        given: list[np.ndarray | None] = [own[i]]
        for source, (by_end, said) in zip(sources, readings, strict=True):
            marked = source[1].vocabulary.space_mark or target[1].vocabulary.space_mark
            asleep = end not in by_end or (i + 1 < len(ends) - 1 and end == following)
            asleep |= bool(marked) and end == 0
            said_here = None if asleep else in_tokens_of(target, source, own[i], said[by_end[end]])
            given.append(said_here)
        if i + 1 >= block.prefix_tokens:
            yield int(block.ids[i + 1]), given


def cost(target: Loaded, sources: list[Loaded], text: str, last: bool, how: str) -> float:
    """Nats of a text without EOS, by the definition."""
    weights, total = [1.0] * (1 + len(sources)), 0.0
    for true, given in members_at(target, sources, text, last):
        awake = [m for m, one in enumerate(given) if one is not None]
        for m in awake:
            assert given[m].sum() == pytest.approx(1, abs=1e-5)
        mean = sum(weights[m] * given[m][true] for m in awake) / sum(weights[m] for m in awake)
        if how == "bayes":
            for m in awake:
                weights[m] *= given[m][true] / mean
        if true != target[1].vocabulary.eos_id:
            total -= np.log(mean)
    return total


@pytest.mark.parametrize("how", ["uniform", "bayes"])
@pytest.mark.parametrize("target", ["llama", "neox"])
def test_it_is_what_the_definition_says(models: dict[str, Loaded], target: str, how: Any) -> None:
    others = {name: one for name, one in models.items() if name != target}
    nats = Ensemble(models[target], others, how).nats(TEXTS, LAST, batch_tokens=128)
    for text, last, row in zip(TEXTS, LAST, nats, strict=True):
        assert row is not None
        assert len(row) == len(text.encode())
        expected = cost(models[target], list(others.values()), text, last, how)
        assert np.nansum(row) == pytest.approx(expected, rel=1e-4)


def test_the_target_alone_or_with_itself_is_the_target(models: dict[str, Loaded]) -> None:
    model, tokenizer = models["llama"]
    encoded = tokenizer.encode(TEXTS, LAST)
    plain = blocks_nats(model, encoded, [len(text.encode()) for text in TEXTS], None)
    for sources in ({}, {"itself": models["llama"]}):
        for how in ("uniform", "bayes"):
            for own, row in zip(
                plain, Ensemble(models["llama"], sources, how).nats(TEXTS, LAST), strict=True
            ):
                np.testing.assert_allclose(row, own, rtol=1e-4, atol=1e-6)


def test_bayes_costs_little_more_than_the_best(models: dict[str, Loaded]) -> None:
    """At most the log of the number of members, in each text; none sleeps, with one tokenizer."""
    model, tokenizer = models["llama"]
    torch.manual_seed(0)
    others = {}
    for n in range(3):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        others[str(n)] = (other, tokenizer)
    members = [models["llama"], *others.values()]
    sums = np.array([[np.nansum(row) for row in Ensemble(one, {}).nats(TEXTS)] for one in members])
    mixed = np.array([np.nansum(row) for row in Ensemble(members[0], others, "bayes").nats(TEXTS)])
    assert (mixed <= sums.min(axis=0) + np.log(len(members)) + 1e-3).all()
    assert sums.std(axis=0).min() > 1


def test_it_writes_what_is_most_probable(models: dict[str, Loaded]) -> None:
    target, sources = models["llama"], {name: models[name] for name in ("neox", "mpt")}
    prompt = prose(5)[:40]
    (block,) = target[1].encode([prompt], [False])
    own = after(target, block.ids)[-1]
    given = [own]
    for source in sources.values():
        (read,) = source[1].encode([prompt], [False])
        given.append(in_tokens_of(target, source, own, after(source, read.ids)[-1]))
    first = target[1].vocabulary.token_bytes[int(np.mean(given, axis=0).argmax())]
    assert first is not None
    written = Ensemble(target, sources).generate(prompt, max_new_tokens=1)
    assert written == first.decode("utf-8", "replace")
    assert isinstance(Ensemble(target, sources, "bayes").generate(prompt, max_new_tokens=2), str)


def test_it_goes_on_where_a_text_ends_within_a_character(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sources sleep then, who read whole characters alone."""
    target, source = models["neox"], models["llama"]
    ensemble = Ensemble(target, {"llama": source})
    loaded = [target[0], source[0]]
    ids = target[1].encode(["a"], [False])[0].ids
    awake, asleep = (list(ensemble._next(loaded, ids, text))[1] for text in (b"a", b"a\xf0\x9f"))
    assert np.isfinite(awake).all()
    assert awake.sum() == pytest.approx(1, abs=1e-6)
    assert np.isnan(asleep).all()


def test_what_cannot_be_an_ensemble_is_told(models: dict[str, Loaded]) -> None:
    with pytest.raises(ArgumentError, match="no weights 'equal'; known: uniform, bayes"):
        Ensemble(models["llama"], {}, "equal")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"this is a int; give \(model, tokenizer\)"):
        Ensemble(models["llama"], {"neox": 3})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="cannot read the prompt ''"):
        Ensemble(models["llama"], {}).generate("")
    with pytest.raises(ArgumentError, match="the model's context is"):
        Ensemble(models["llama"], {}).nats([prose(1) * 200])
