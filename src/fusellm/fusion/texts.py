"""Several sources' distributions over texts become one, in memory: no recipe, no folder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.alignment.strategies import vocabulary_map
from fusellm.arrays.fused import Fused
from fusellm.arrays.given_texts import GivenTexts, Texts
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.source_distributions import (
    SourceDistributions,
    predicted_of,
    tokens_of_texts,
)
from fusellm.config import FusionSettings
from fusellm.errors import ArgumentError
from fusellm.fusion.functions import FUNCTIONS, Compared
from fusellm.fusion.fuse import Counts, fuse_blocks, rules_of
from fusellm.fusion.pairing import pair
from fusellm.progress import Progress
from fusellm.recipe_file import checked_settings
from fusellm.tokens.encode import Encoded, Encoder

FusionFunction = Callable[[Compared], np.ndarray]
_WEIGHT_ERROR = 1e-6
"""How far the weights of a position may be from 1 in all."""


@dataclass(frozen=True, eq=False)
class FusedOutcome:
    """One outcome of a fused distribution: some target tokens that count as one event.

    Attributes:
        source: whose part of the distribution it is of.
        ids: int64 target ids.
        tokens: these as text.
        mass: probability that one of them comes next.
    """

    source: str
    ids: np.ndarray
    tokens: tuple[str, ...]
    mass: float


@dataclass(frozen=True, eq=False)
class FusedDistributions:
    """Fused distributions over texts, at the target's tokens.

    `fusellm.FusedDataset` makes a dataset of them, for any training.

    Attributes:
        texts: that the sources have read; of conversations what is learnt of each.
        encoder: the target's tokenizer.
        encoded: the texts as the target reads them.
        sources: their names; a part's `source` is an index of it.
        fused: the distributions, at all but the last token of each text that the target reads.
        sets: of each source its outcomes, as sets of target ids.
        counts: of each source, by name what `fusion.fuse.Counts` says, by text; of conversations
            by answer.
    """

    texts: tuple[str, ...]
    encoder: Encoder
    encoded: tuple[Encoded, ...]
    sources: tuple[str, ...]
    fused: Fused
    sets: tuple[OutcomeSets, ...]
    counts: dict[str, Counts]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        there, positions = int((self.fused.parts > 0).sum()), len(self.fused.parts)
        won = ", ".join(f"{name} {share:.0%}" for name, share in self.won.items())
        return (
            f"{type(self).__name__}({len(self):,} texts; {there:,} of {positions:,} positions have "
            f"a distribution; {won})"
        )

    @property
    def won(self) -> dict[str, float]:
        """Share of what was won: of a source its weight in the fused distributions, of a referee
        the positions that it kept all others from."""
        weights = {name: float(counts["wins"].sum()) for name, counts in self.counts.items()}
        whole = max(sum(weights.values()), 1e-30)
        return {name: weight / whole for name, weight in weights.items()}

    @property
    def aligned(self) -> dict[str, float]:
        """Share of the positions at which each source has a distribution."""
        learnt = predicted_of(self.encoded)
        positions = max(len(self.fused.parts) if learnt is None else int(learnt.sum()), 1)
        return {name: float(c["aligned"].sum()) / positions for name, c in self.counts.items()}

    @cached_property
    def _position_offsets(self) -> np.ndarray:
        """[texts+1] where the positions of each text are; one that is not read has none."""
        return tokens_of_texts(self.encoded).position_offsets

    def block(self, number: int) -> dict[str, Any]:
        """One text's row of a training, as the fused store has it (docs/store-format.md)."""
        ids = self.encoded[number].ids
        fused = self.fused.between(*self._position_offsets[number : number + 2])
        if self.encoded[number].ends is None:  # it has positions all the same, without parts
            fused = replace(fused, parts=np.zeros(max(len(ids) - 1, 0), np.uint8))
        return {"block": number, "ids": ids} | fused.columns()

    def at(self, text: int, position: int) -> list[FusedOutcome]:
        """The fused distribution after one token of a text, the most probable outcome first.

        What is missing to 1 is in none of these outcomes. An empty list is no distribution.

        Raises:
            ArgumentError: there is no such text or position.
        """
        if not 0 <= text < len(self):
            raise ArgumentError(f"there is no text {text}: {len(self)} were fused")
        first, end = self._position_offsets[text : text + 2].tolist()
        if not 0 <= position < end - first:
            raise ArgumentError(f"there is no position {position}: text {text} has {end - first}")
        there = self.fused.between(first + position, first + position + 1)
        outcomes = []
        of_outcome = there.source[there.part_of_outcome].tolist()
        for source, outcome, mass in zip(of_outcome, there.outcomes, there.masses, strict=True):
            ids = self.sets[source][outcome]
            tokens = tuple(self.encoder.spelled(id_) for id_ in ids.tolist())
            outcomes.append(FusedOutcome(self.sources[source], ids, tokens, float(mass)))
        return sorted(outcomes, key=lambda outcome: -outcome.mass)


def fuse(
    texts: Texts,
    target: Encoder | PreTrainedTokenizerBase,
    sources: Mapping[str, SourceDistributions],
    function: str | FusionFunction = "mince",
    *,
    strategy: str = "partition",
    granularity: str = "window",
    window_bytes: int = 64,
    hindsight: bool = True,
    routes: Sequence[str] = (),
    cross_entropy: str = "bits_per_byte",
    beta: float = 5.0,
    token_healing: bool | None = None,
    refine: str | None = None,
    inside_tokens: bool = False,
    compatibility: str = "none",
    referees: Collection[str] = (),
    progress: Progress | None = None,
) -> FusedDistributions:
    """Translate several sources' distributions into the target's tokens, and fuse them.

    Args:
        texts: that all sources have read, the same for all: plain, or conversations.
        target: tokenizer of the model that is to learn from them; of conversations with its chat
            template.
        sources: their distributions by name, from `read_distributions`.
        function: `mince`, `avgce`, `avgce_paper`, `uniform`, `best`, `bayes`, `route`, or a
            function of one's own: it is given a `fusellm.fusion.functions.Compared` over S sources
            and N positions, and gives weights [S, N], at each position of sum 1 over the sources
            that are aligned there, and 0 for the others.
        strategy, refine, token_healing, inside_tokens, compatibility: how one is translated, as in
            a recipe's `fusion:` block (docs/method.md).
        granularity, window_bytes, hindsight, cross_entropy, beta: what sources are compared by, as
            there.
        routes: for `route`, of each text the name of the source that alone is heard there.
        referees: names of sources that are compared and never taught: where a source costs as much
            as one of them, it is not heard.
        progress: is shown how far vocabulary maps are.

    Raises:
        ArgumentError: a setting is wrong, there is no source, a source has read other texts, or
            the function gives no such weights.
        TokenizerError: the target's tokens cannot be told as bytes.

    >>> from fusellm import Tokenizer, load_pretrained, read_distributions
    >>> texts = ["for item in items:", "import the module"]
    >>> read = {}
    >>> for name in ("python", "cpp"):
    ...     model, tokenizer = load_pretrained(f"zoo/{name}", device="cpu")
    ...     read[name] = read_distributions(model, tokenizer, texts)
    >>> fused = fuse(texts, Tokenizer.from_pretrained("zoo/prose"), read)
    >>> fused
    FusedDistributions(2 texts; 8 of 10 positions have a distribution; python 62%, cpp 38%)
    >>> likeliest, second, *_ = fused.at(0, 2)
    >>> likeliest.source, likeliest.tokens, round(likeliest.mass, 2)
    ('python', (' in',), 0.29)

    What is not in the text stays a class of target tokens that the source cannot tell apart:

    >>> second.tokens[:3], round(second.mass, 2)
    (('<0x2E>', '.', './'), 0.1)
    """
    given = {
        "function": function if isinstance(function, str) and function != "route" else "uniform",
        "strategy": strategy,
        "granularity": granularity,
        "window_bytes": window_bytes,
        "hindsight": hindsight,
        "cross_entropy": cross_entropy,
        "beta": beta,
        "token_healing": token_healing,
        "refine": refine,
        "inside_tokens": inside_tokens,
        "compatibility": compatibility,
    }
    settings = checked_settings(FusionSettings, given)
    given_texts = GivenTexts.of(texts)
    encoder = given_texts.encoder(target)
    last = _require_same_texts(given_texts, sources)
    encoded = given_texts.encode(encoder, None if given_texts.conversations else last)
    predicted = predicted_of(encoded) if given_texts.conversations else None
    tokens = given_texts.fused_apart(tokens_of_texts(encoded), predicted)
    readings, sets = [], []
    for read in sources.values():
        map_ = vocabulary_map(read.encoder, encoder, strategy, progress=progress)
        pairing = pair(read.encoder, encoder, map_, settings)
        sets.append(pairing.sets)
        of_source = given_texts.fused_apart(read.tokens, read.predicted)
        readings.append(pairing.reading(tokens, of_source, read.kept))
    rules = rules_of(settings, _are_referees(sources, referees, settings))
    routed = None
    if function == "route":  # of texts, where a recipe routes domains
        routed = _routed(routes, given_texts, sources, referees)
        rules = replace(rules, function=FUNCTIONS[function])
    elif routes:
        raise ArgumentError("routes belong to function='route'; leave them out")
    if not isinstance(function, str):
        rules = replace(rules, function=_checked(function, list(sources)))
    fused, _, each = fuse_blocks(tokens, given_texts.byte_offsets, readings, rules, routed)
    if predicted is not None:
        fused = _at_what_is_learnt(fused, encoded)
    counts = dict(zip(sources, each, strict=True))
    return FusedDistributions(
        given_texts.texts, encoder, tuple(encoded), tuple(sources), fused, tuple(sets), counts
    )


def _at_what_is_learnt(fused: Fused, encoded: Sequence[Encoded]) -> Fused:
    """Distributions of answers at the positions of their conversations; elsewhere there is none."""
    read = [block.predicted for block in encoded if block.predicted is not None]
    there = np.concatenate([np.zeros(0, dtype=np.bool_), *(one[1:] for one in read)])
    parts = np.zeros(len(there), dtype=np.uint8)
    parts[there] = fused.parts
    return replace(fused, parts=parts)


def _are_referees(
    sources: Mapping[str, SourceDistributions], referees: Collection[str], settings: FusionSettings
) -> list[bool]:
    """Of each source whether it is a referee.

    Raises:
        ArgumentError: one is no source, or none is left to teach.
    """
    unknown = sorted(set(referees) - set(sources))
    if unknown:
        raise ArgumentError(f"referee {unknown[0]!r} is no source; known: {', '.join(sources)}")
    if referees and len(set(referees)) == len(sources):
        raise ArgumentError("all sources are referees; at least one has to teach")
    if referees and settings.compatibility == "paper":
        raise ArgumentError("compatibility='paper' has no referees; leave them out")
    return [name in referees for name in sources]


def _routed(
    routes: Sequence[str],
    texts: GivenTexts,
    sources: Mapping[str, SourceDistributions],
    referees: Collection[str],
) -> np.ndarray:
    """[texts] number of the source that each text goes to.

    Raises:
        ArgumentError: there is not one for each text, or one is no source that teaches.
    """
    if isinstance(routes, str) or len(routes) != len(texts):
        given = repr(routes) if isinstance(routes, str) else len(routes)
        raise ArgumentError(
            f"function='route' needs routes, the name of a source for each of the {len(texts)} "
            f"texts; got {given}"
        )
    teaching = [name for name in sources if name not in referees]
    stray = next((name for name in routes if name not in teaching), None)
    if stray is not None:
        raise ArgumentError(
            f"routes: {stray!r} is no source that teaches; known: {', '.join(teaching)}"
        )
    order = list(sources)
    numbers = np.array([order.index(name) for name in routes], dtype=np.int64)
    return np.asarray(numbers[texts.text_of_each])


def _require_same_texts(
    texts: GivenTexts, sources: Mapping[str, SourceDistributions]
) -> tuple[bool, ...]:
    """Which texts end a document, as all sources have read them.

    Raises:
        ArgumentError: there is no source, or one is none or has read other texts.
    """
    if not isinstance(sources, Mapping):
        raise ArgumentError(
            f"sources are a {type(sources).__name__}, where each needs a name: give a dictionary, "
            "{name: distributions}"
        )
    for name, read in sources.items():
        if not isinstance(read, SourceDistributions):
            raise ArgumentError(
                f"source {name} is a {type(read).__name__}; give what read_distributions gives"
            )
    if not sources:
        raise ArgumentError("there is no source to fuse; give the distributions of at least one")
    last = next(iter(sources.values())).last
    for name, read in sources.items():
        if (read.texts, read.conversations) != (texts.texts, texts.conversations):
            pairs = zip(
                read.conversations or read.texts, texts.conversations or texts.texts, strict=False
            )
            at = next((n for n, (text_read, given) in enumerate(pairs) if text_read != given), None)
            where = f"{len(read)} of them, not {len(texts)}" if at is None else f"text {at} differs"
            raise ArgumentError(f"source {name} has read other texts ({where}); read these with it")
        if read.last != last:
            raise ArgumentError(
                f"source {name} was read with other ends of documents (`last`) than the first one"
            )
    return last


def _checked(function: FusionFunction, names: Sequence[str]) -> FusionFunction:
    """A function of somebody's own, whose weights are looked at."""

    def weights(compared: Compared) -> np.ndarray:
        source_weights = np.asarray(function(compared), dtype=np.float64)
        called = getattr(function, "__name__", "the fusion function")
        shape = compared.aligned.shape
        if source_weights.shape != shape:
            raise ArgumentError(
                f"{called} gives weights of shape {source_weights.shape}; [sources, positions] is "
                f"{shape}"
            )
        if not np.isfinite(source_weights).all() or (source_weights < 0).any():
            raise ArgumentError(f"{called} gives weights that are negative or not finite")
        stray = (source_weights > 0) & ~compared.aligned
        if stray.any():
            s, n = np.argwhere(stray)[0].tolist()
            raise ArgumentError(
                f"{called} gives source {names[s]} the weight {source_weights[s, n]:.3g} at "
                f"position {n}, where it has no distribution; where `compared.aligned` is False it "
                "must be 0"
            )
        sums, there = source_weights.sum(axis=0), compared.aligned.any(axis=0)
        wrong = there & (np.abs(sums - 1) > _WEIGHT_ERROR)
        if wrong.any():
            n = int(np.argmax(wrong))
            raise ArgumentError(
                f"{called} gives weights that sum to {sums[n]:.6g} at position {n}, and not to 1"
            )
        return source_weights

    return weights
