"""A world of texts that is known whole, and the models that have learnt it perfectly.

Every text has its probability. Such a model says, after some tokens, which share of the texts that
begin with these tokens goes on with which.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.tokens.encode import Encoder

LETTERS = ("a", "b", ";", "\n")
NOTHING = np.zeros(0, dtype=np.float32)
Model = dict[tuple[int, ...], dict[int, float]]


def bpe(*merges: str, letters: Sequence[str] = LETTERS, by_words: bool = False) -> Encoder:
    """A byte-level tokenizer of single letters and of these merges, `left right`, in their order.

    It puts a token before each text, so that a text's first token is predicted too.

    Args:
        by_words: texts are cut into words first, by GPT-2's rule: of several spaces before a word
            the last one belongs to it, and not to the others.
    """
    byte = {letter: byte_level(letter) for letter in letters}
    pairs = [tuple(byte_level(half) for half in merge.split("+")) for merge in merges]
    tokens = ["<eos>", "<bos>", *byte.values(), *(left + right for left, right in pairs)]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return Encoder(
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")
    )


def byte_level(text: str) -> str:
    """As byte-level tokenizers spell it."""
    return text.replace("\n", "Ċ").replace(" ", "Ġ")


def texts_with_probabilities(count: int, letters: Sequence[str] = LETTERS) -> dict[str, float]:
    """Every text of so many letters, with a random probability."""
    every = ["".join(some) for some in itertools.product(letters, repeat=count)]
    chance = np.random.default_rng(0).dirichlet(np.full(len(every), 0.3))
    return dict(zip(every, chance.tolist(), strict=True))


def tokens_of(encoder: Encoder, texts: Sequence[str], last: bool = True) -> Tokens:
    blocks = encoder.encode(list(texts), [last] * len(texts))
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


def said(tokens: Tokens, model: Model, draws: int | None, seed: int) -> Kept:
    """What a model says at each position, all of it or so many systematic draws."""
    chance = np.random.default_rng(seed)
    rows, true = [], []
    for b in range(len(tokens.offsets) - 1):
        ids = tuple(tokens.ids[tokens.offsets[b] : tokens.offsets[b + 1]].tolist())
        for n in range(1, len(ids)):
            rows.append(dict(sorted(model[ids[:n]].items())))
            true.append(np.log(rows[-1][ids[n]]))
    if draws is not None:
        for row in rows:
            ends = np.cumsum(list(row.values())) * draws
            counts = np.diff(np.ceil(ends - chance.random()), prepend=0).astype(int)
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
