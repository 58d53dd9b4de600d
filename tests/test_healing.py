"""Token healing: a source is asked for what comes after bytes, not after its tokens.

The oracle is a world that is known whole: every text has its probability, and a model that has
learnt it perfectly says, after some tokens, which share of the texts that begin with these tokens
goes on with which. Such a source, translated, must say at each position what such a target says.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusellm.align.continuations import continuations_of
from fusellm.align.ragged import offsets_of
from fusellm.align.strategies import STRATEGIES, Tokens
from fusellm.config import FusionSettings
from fusellm.fusion.functions import mince
from fusellm.fusion.fuse import Rules, fuse_blocks
from fusellm.fusion.kept import Kept
from fusellm.fusion.pairing import Pairing
from fusellm.tokens.encode import Encoder

LETTERS = ("a", "b", ";", "\n")
NOTHING = np.zeros(0, dtype=np.float32)
Model = dict[tuple[int, ...], dict[int, float]]


def bpe(*merges: str) -> Encoder:
    """A byte-level tokenizer of single letters and of these merges, `left right`, in their order.

    It puts a token before each text, so that a text's first token is predicted too.
    """
    byte = {letter: byte_level(letter) for letter in LETTERS}
    pairs = [tuple(byte_level(half) for half in merge.split("+")) for merge in merges]
    tokens = ["<eos>", "<bos>", *byte.values(), *(left + right for left, right in pairs)]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return Encoder(
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")
    )


def byte_level(text: str) -> str:
    """As byte-level tokenizers spell it."""
    return text.replace("\n", "Ċ")


def texts_with_probabilities(letters: int) -> dict[str, float]:
    """Every text of so many letters, with a random probability."""
    every = ["".join(some) for some in itertools.product(LETTERS, repeat=letters)]
    chance = np.random.default_rng(0).dirichlet(np.full(len(every), 0.3))
    return dict(zip(every, chance.tolist(), strict=True))


def tokens_of(encoder: Encoder, texts: Sequence[str]) -> Tokens:
    blocks = encoder.encode(list(texts), [True] * len(texts))
    ends = [block.ends for block in blocks if block.ends is not None]
    return Tokens(
        offsets_of(np.array([len(block.ids) for block in blocks])),
        np.concatenate([block.ids for block in blocks]),
        np.concatenate(ends),
        encoder.prefix_tokens,
    )


def learnt(encoder: Encoder, world: dict[str, float]) -> Model:
    """What a model that knows the world says after each beginning of its tokens."""
    sums: dict[tuple[int, ...], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    blocks = encoder.encode(list(world), [True] * len(world))
    for block, share in zip(blocks, world.values(), strict=True):
        ids = tuple(block.ids.tolist())
        for n in range(1, len(ids)):
            sums[ids[:n]][ids[n]] += share
    return {
        before: {id_: mass / sum(row.values()) for id_, mass in row.items()}
        for before, row in sums.items()
    }


def said(tokens: Tokens, model: Model, draws: int | None = None) -> Kept:
    """What a model says at each position, all of it or so many draws."""
    chance = np.random.default_rng(1)
    rows, true = [], []
    for b in range(len(tokens.offsets) - 1):
        ids = tuple(tokens.ids[tokens.offsets[b] : tokens.offsets[b + 1]].tolist())
        for n in range(1, len(ids)):
            rows.append(dict(sorted(model[ids[:n]].items())))
            true.append(np.log(rows[-1][ids[n]]))
    if draws is not None:
        for row in rows:
            counts = chance.multinomial(draws, list(row.values()))
            drawn = {id_: int(n) for id_, n in zip(row, counts, strict=True) if n}
            row.clear()
            row.update(drawn)
    values = np.array([value for row in rows for value in row.values()])
    return Kept(
        offsets_of(np.array([len(row) for row in rows])),
        np.array([id_ for row in rows for id_ in row]),
        np.log(values).astype(np.float32) if draws is None else NOTHING,
        NOTHING.astype(np.uint8) if draws is None else values.astype(np.uint8),
        np.zeros(len(rows), dtype=np.float32),
        np.array(true, dtype=np.float32),
    )


def differences(
    source: Encoder,
    target: Encoder,
    world: dict[str, float],
    strategy: str = "partition",
    heals: bool = True,
    draws: int | None = None,
) -> list[tuple[float, float]]:
    """(what is taught, what a perfect target says) of each outcome, at all aligned positions."""
    texts = list(world)
    mine, theirs = tokens_of(target, texts), tokens_of(source, texts)
    translation = STRATEGIES[strategy].translate(source, target, None)
    aligner = STRATEGIES[strategy].aligner(source, target, translation)
    pairing = Pairing(translation, aligner, continuations_of(source, target) if heals else None)
    reading = pairing.reading(mine, theirs, said(theirs, learnt(source, world), draws))
    sizes = offsets_of(np.array([len(text.encode()) for text in texts]))
    fused, _, _ = fuse_blocks(mine, sizes, [reading], Rules(mince))
    right = learnt(target, world)
    found = []
    part, outcome = 0, 0
    for b in range(len(texts)):
        ids = tuple(mine.ids[mine.offsets[b] : mine.offsets[b + 1]].tolist())
        for n in range(1, len(ids)):
            position = mine.position_offsets[b] + n - 1
            if fused.parts[position] == 0:
                continue
            taught: dict[int, float] = {}
            for _ in range(fused.lengths[part]):
                taught[int(fused.outcomes[outcome])] = float(fused.masses[outcome])
                outcome += 1
            part += 1
            expected: dict[int, float] = defaultdict(float)
            for id_, mass in right[ids[:n]].items():
                expected[int(translation.outcome_of_target[id_])] += mass
            every = taught.keys() | expected.keys()
            found += [(taught.get(o, 0.0), expected.get(o, 0.0)) for o in every]
    return found


def worst(found: list[tuple[float, float]]) -> float:
    return max(abs(taught - right) for taught, right in found)


APART = (";+\n", "a+b")
"""Merges of which none begins as another ends: all texts that go past a place are asked for."""
OVERLAPPING = (";+\n", "a+b", "b+;", "ab+;", "a+;\n")


@pytest.mark.parametrize("strategy", ["partition", "bytes"])
@pytest.mark.parametrize("target", [(), (";+\n",), ("a+b",), APART, APART[::-1]])
def test_what_is_taught_is_what_a_target_that_knows_the_world_says(
    strategy: str, target: tuple[str, ...]
) -> None:
    world = texts_with_probabilities(5)
    pair = bpe(*APART), bpe(*target)
    assert worst(differences(*pair, world, strategy)) < 1e-5
    if len(target) < len(APART):
        assert worst(differences(*pair, world, strategy, heals=False)) > 0.3


@pytest.mark.parametrize("target", [(), ("a+b",), (";+\n", "a+b")])
def test_one_token_back_is_most_of_the_way_where_merges_overlap(target: tuple[str, ...]) -> None:
    world = texts_with_probabilities(5)
    pair = bpe(*OVERLAPPING), bpe(*target)
    healed, read = (
        float(np.mean([abs(a - b) for a, b in differences(*pair, world, heals=heals)]))
        for heals in (True, False)
    )
    assert healed < 0.3 * read
