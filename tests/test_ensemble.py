"""Several models as one at inference, against a slow oracle that writes out every distribution."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers

import fusellm
from conftest import code, prose
from fusellm import Ensemble
from fusellm.alignment.translation import as_continuations
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.errors import ArgumentError, NumericsError
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
    """[Vt] a source's distribution, each class divided as the target divides it.

    Special tokens of the source but EOS are none of the text, and get no part.
    """
    map_ = fusellm.vocabulary_map(source[1], target[1])
    spelled, eos = source[1].vocabulary.token_bytes, source[1].vocabulary.eos_id
    by_class: dict[int, float] = {}
    for id_, class_ in enumerate(map_.outcome_of_source.tolist()):
        if spelled[id_] is not None or id_ == eos:
            by_class[class_] = by_class.get(class_, 0.0) + said[id_]
    classes = map_.outcome_of_target.tolist()
    whole: dict[int, float] = {}
    for id_, class_ in enumerate(classes):
        whole[class_] = whole.get(class_, 0.0) + own[id_]
    there = sum(mass for c, mass in by_class.items() if c in whole)
    return np.array(
        [by_class.get(c, 0.0) / there * own[v] / whole[c] for v, c in enumerate(classes)]
    )


def spanned(source: Loaded, read: Any, text: str, end: int) -> np.ndarray | None:
    """What a source says within one of its tokens, asked after its last 64 whole ones."""
    whole = [j for j, its in enumerate(read.ends.tolist()) if its <= end]
    begin = read.ends[whole[-1]] if whole else 0
    rest = text.encode()[begin:end]
    if begin == 0:
        try:
            (start,) = source[1].encode([rest.decode()], [False])
        except UnicodeDecodeError:
            return None
        return after(source, start.ids)[-1]
    told = as_continuations(source[1], [rest])[rest] if rest else None
    if told is None:
        return None
    prefix = list(read.ids[: read.prefix_tokens])
    before = list(read.ids[read.prefix_tokens : len(whole)])[-64:]
    return after(source, np.array([*prefix, *before, *told.ids]))[-1]


def members_at(
    target: Loaded, sources: list[Loaded], text: str, last: bool
) -> Iterator[tuple[int, list[np.ndarray | None]]]:
    """The true next token of each position, and what each member says; None where it sleeps."""
    (block,) = target[1].encode([text], [last])
    own = after(target, block.ids)
    readings = []
    for source in sources:
        (read,) = source[1].encode([text], [last])
        if read.ends is None:
            readings.append((read, {}, None))
            continue
        by_end = {end: j for j, end in enumerate(read.ends.tolist()[:-1])}
        readings.append((read, by_end, after(source, read.ids)))
    ends = block.ends.tolist()
    for i, (end, following) in enumerate(pairwise(ends)):
        given: list[np.ndarray | None] = [own[i]]
        for source, (read, by_end, said) in zip(sources, readings, strict=True):
            marked = source[1].vocabulary.space_mark or target[1].vocabulary.space_mark
            repeated = i + 1 < len(ends) - 1 and end == following
            says = None
            if said is None or repeated or (marked and end == 0):
                pass
            elif end in by_end:
                says = said[by_end[end]]
            elif end > 0:
                says = spanned(source, read, text, end)
            given.append(None if says is None else in_tokens_of(target, source, own[i], says))
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
    slept = woken = 0
    for text, last, row in zip(TEXTS, LAST, nats, strict=True):
        for _, given in members_at(models[target], list(others.values()), text, last):
            slept += sum(one is None for one in given)
            woken += sum(one is not None for one in given[1:])
        assert row is not None
        assert len(row) == len(text.encode())
        expected = cost(models[target], list(others.values()), text, last, how)
        assert np.nansum(row) == pytest.approx(expected, rel=1e-4)
    assert slept < woken / 4  # within characters, and before a dummy space


def test_what_a_source_says_depends_on_the_text_so_far_alone(models: dict[str, Loaded]) -> None:
    """Each place is asked for from the whole text, and from the text that ends there.

    The two differ where a source would cut the text so far otherwise than it cuts the whole.
    """
    target, sources = models["neox"], {name: models[name] for name in ("llama", "mpt")}
    ensemble = Ensemble(target, sources)
    loaded = [target[0], *(model for model, _ in sources.values())]
    places, equal = 0, 0
    for text in (TEXTS[0][:90], TEXTS[1][:90]):
        (block,) = target[1].encode([text], [False])
        said = ensemble._said([text], [False], tokens_of_texts([block]), None)
        for n, true in enumerate(block.ids[1:].tolist()):
            so_far = text.encode()[: block.ends[n]]
            alone = list(ensemble._next(loaded, block.ids[: n + 1], so_far))
            for m, one in enumerate(alone):
                if one is not None and said.awake[m, n]:
                    places += 1
                    equal += abs(np.log(one[true]) - said.log_probs[m, n]) < 1e-3
    assert places > 150
    assert equal / places > 0.9


def test_the_target_alone_or_with_itself_is_the_target(models: dict[str, Loaded]) -> None:
    model, tokenizer = models["llama"]
    encoded = tokenizer.encode(TEXTS, LAST)
    plain = blocks_nats(model, encoded, [len(text.encode()) for text in TEXTS], None)
    for how in ("uniform", "bayes"):
        alone = Ensemble(models["llama"], {}, how).nats(TEXTS, LAST)
        twice = Ensemble(models["llama"], {"itself": models["llama"]}, how).nats(TEXTS, LAST)
        for own, row, more in zip(plain, alone, twice, strict=True):
            np.testing.assert_allclose(row, own, rtol=1e-4, atol=1e-6)
            # As a source it gives special tokens nothing, and so the others a little more.
            np.testing.assert_allclose(more, own, rtol=1e-2, atol=1e-6)
            assert (more < own + 1e-6).all()


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

    # By Bayes' rule, the weights after the prompt.
    positions = members_at(target, list(sources.values()), prompt, last=False)
    weights = np.ones(3)
    for true, said in positions:
        there = np.array([one is not None for one in said])
        p = np.array([0.0 if one is None else one[true] for one in said])
        mean = (weights * p)[there].sum() / weights[there].sum()
        weights[there] *= p[there] / mean
    assert abs(weights - 1).max() > 0.5
    chosen = int((weights[:, None] * np.array(given)).sum(axis=0).argmax())
    first = target[1].vocabulary.token_bytes[chosen]
    assert first is not None
    written = Ensemble(target, sources, "bayes").generate(prompt, max_new_tokens=1)
    assert written == first.decode("utf-8", "replace")


def test_a_source_that_cannot_read_a_text_sleeps_and_a_target_gives_none(
    models: dict[str, Loaded],
) -> None:
    target, source = models["llama"], models["neox"]
    model, tokenizer = source
    lower = copy.deepcopy(tokenizer.tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = ["Not In Lower Case 12"]
    alone = Ensemble(target, {}).nats(text)[0]
    asleep = Ensemble(target, {"lower": (model, lower)}).nats(text)[0]
    np.testing.assert_allclose(asleep, alone, rtol=1e-5)
    assert Ensemble((model, lower), {"llama": target}).nats(text) == [None]


def test_it_goes_on_where_a_text_ends_within_a_character(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sources sleep then, who read whole characters alone."""
    target, source = models["neox"], models["llama"]
    ensemble = Ensemble(target, {"llama": source})
    loaded = [target[0], source[0]]
    ids = target[1].encode(["a"], [False])[0].ids
    awake, asleep = (list(ensemble._next(loaded, ids, text))[1] for text in (b"a", b"a\xf0\x9f"))
    assert awake is not None
    assert awake.sum() == pytest.approx(1, abs=1e-6)
    assert asleep is None


def test_what_cannot_be_an_ensemble_is_told(models: dict[str, Loaded]) -> None:
    how: Any = "equal"
    wrong: Any
    with pytest.raises(ArgumentError, match="no weights 'equal'; known: uniform, bayes"):
        Ensemble(models["llama"], {}, how)
    model, tokenizer = models["llama"]
    for wrong, kind in (
        (3, "int"),
        ((tokenizer, model), "Tokenizer and LlamaForCausalLM"),
        (("a", tokenizer), "str and Tokenizer"),
    ):
        with pytest.raises(ArgumentError, match=rf"the model first, .*; this is {kind}"):
            Ensemble(models["llama"], {"neox": wrong})
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match="neox gives NaN or infinity"):
        Ensemble(models["mpt"], {"neox": (broken, tokenizer)}).nats(TEXTS)
    with pytest.raises(NumericsError, match="neox gives NaN or infinity"):
        Ensemble(models["mpt"], {"neox": (broken, tokenizer)}).generate("a b")
    with pytest.raises(ArgumentError, match="cannot read the prompt ''"):
        Ensemble(models["llama"], {}).generate("")
    with pytest.raises(ArgumentError, match="the model's context is"):
        Ensemble(models["llama"], {}).nats([prose(1) * 200])
    with pytest.raises(ArgumentError, match="the model's context is"):
        Ensemble(models["mpt"], {"llama": models["llama"]}).generate(prose(1) * 200)
    assert Ensemble(models["llama"], {"neox": models["neox"]}).nats([]) == []
