"""One block seen from every side: what each model read, and what became of it at each position.

Arrays in, words and numbers for people out; nothing is computed here that fusion does not compute.

T tokens of one model's reading; N target positions that predict; S sources, in the recipe's order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusellm.alignment.positions import Situation
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.fusion.carry import carry
from fusellm.fusion.cross_entropy import NATS_PER_BIT, span_nats
from fusellm.fusion.fuse import Reading, Rules
from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Read:
    """A block as one model reads it.

    Attributes:
        read: whether it could: a tokenizer may change the text.
        ids: [T] token ids, prefix and EOS included; none where it could not.
        spelled: [T] what the tokens stand for; a special token as its tokenizer writes it.
        ends: [T] boundaries in bytes.
    """

    read: bool
    ids: tuple[int, ...]
    spelled: tuple[str, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class SourceView:
    """One source's part in a block.

    Attributes:
        name: the source's.
        tokens: its reading.
        positions: [N] the place of its aligned position, -1 for none.
        situations: [N] by boundaries, whatever the alignment.
        weights: [N] its share of the fused distributions, rounded as stored; 0 where it has none.
        cross_entropy: [N] by which sources are compared there; the recipe says in what.
        bits_per_byte: over the block's bytes that it scored; None where it did not read it.
    """

    name: str
    tokens: Read
    positions: tuple[int, ...]
    situations: tuple[Situation, ...]
    weights: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    bits_per_byte: float | None


@dataclass(frozen=True)
class Entry:
    """A kept token: `outcome` is the number of what it becomes, None for nothing."""

    id: int
    spelled: str
    probability: float
    outcome: int | None


@dataclass(frozen=True)
class Outcome:
    """A set of target tokens that are one under a source's vocabulary map.

    Attributes:
        number: within the source's map.
        spelled: the target tokens, the shortest first.
        probability: its mass.
        true: whether the true next token is in it.
        leftover: whether these are the tokens that no outcome takes.
    """

    number: int
    spelled: tuple[str, ...]
    probability: float
    true: bool
    leftover: bool


@dataclass(frozen=True)
class Before:
    """A source's distribution at its aligned position, before and after the vocabulary map.

    Attributes:
        place: the source's position.
        next_spelled: the tokens it reads next, until the target's next boundary or past it.
        kept: by probability; of equals the lower id first.
        healed: whether these are healed, and not as they were read.
        tail: mass that was not kept.
        becomes: by probability.
        nowhere: mass of kept tokens that become nothing.
        true_outcome: number of the outcome of the true next token; None where it has none.
    """

    place: int
    next_spelled: tuple[str, ...]
    kept: tuple[Entry, ...]
    healed: bool
    tail: float
    becomes: tuple[Outcome, ...]
    nowhere: float
    true_outcome: int | None


@dataclass(frozen=True)
class Share:
    """One source's part of the fused distribution; with `rest` it sums to `weight`."""

    source: int
    weight: float
    outcomes: tuple[Outcome, ...]
    rest: float


@dataclass(frozen=True)
class At:
    """A chosen position.

    Attributes:
        position: its number, from 0: after the token of this number.
        read_bytes: how much of the block it has read.
        next_spelled: the true next token.
        before: [S] distributions; None where the source is not aligned.
        fused: the parts of the fused distribution; none where no source is aligned.
    """

    position: int
    read_bytes: int
    next_spelled: str
    before: tuple[Before | None, ...]
    fused: tuple[Share, ...]


@dataclass(frozen=True)
class BlockView:
    """A block as the target and every source see it.

    Attributes:
        at: the chosen position; None where the block has none.
    """

    target: Read
    sources: tuple[SourceView, ...]
    at: At | None

    @property
    def positions(self) -> int:
        """N."""
        return max(len(self.target.ids) - 1, 0)

    def winner(self, position: int) -> int | None:
        """The source of most weight at a position, of equals the first; None for none."""
        weights = [source.weights[position] for source in self.sources]
        most = max(weights, default=0.0)
        return weights.index(most) if most > 0 else None


@dataclass(frozen=True)
class Material:
    """Everything that is known of one block.

    Attributes:
        size: its bytes.
        target, encoder: the target's reading, and its tokenizer.
        names, readings, encoders: [S] of the sources.
        fused: its fused distributions, as stored.
        rules: by which they became one.
    """

    size: int
    target: Tokens
    encoder: Encoder
    names: Sequence[str]
    readings: Sequence[Reading]
    encoders: Sequence[Encoder]
    fused: Fused
    rules: Rules


def view_block(material: Material, position: int | None) -> BlockView:
    """See a block from every side.

    Args:
        position: to look at closely, from 0 to N - 1; None takes an instructive one with a fused
            distribution: where the winner cuts what follows otherwise, then where the true next
            token is among its outcomes, then where most sources are aligned; the first of these.
    """
    weights = _weights(material)
    cross_entropy, bits_per_byte = _cross_entropies(material)
    sources = tuple(
        SourceView(
            name,
            _read(reading.tokens, encoder),
            tuple(reading.aligned.source.tolist()),
            tuple(Situation(n) for n in reading.aligned.situations.tolist()),
            tuple(weights[s].tolist()),
            tuple(cross_entropy[s].tolist()),
            bits_per_byte[s],
        )
        for s, (name, reading, encoder) in enumerate(
            zip(material.names, material.readings, material.encoders, strict=True)
        )
    )
    view = BlockView(_read(material.target, material.encoder), sources, None)
    chosen = _instructive(material, view) if position is None else position
    if chosen is None:
        return view
    at = At(
        chosen,
        view.target.ends[chosen],
        view.target.spelled[chosen + 1],
        tuple(_before(material, s, chosen) for s in range(len(sources))),
        _shares(material, weights, chosen),
    )
    return replace(view, at=at)


def _instructive(material: Material, view: BlockView) -> int | None:
    def worth(n: int) -> tuple[bool, bool, int]:
        winner = view.winner(n)
        assert winner is not None
        situation = view.sources[winner].situations[n]
        otherwise = situation not in (Situation.SAME, Situation.UNALIGNED)
        aligned = sum(source.positions[n] >= 0 for source in view.sources)
        return otherwise, _has_true(material, n), aligned

    won = [n for n in range(view.positions) if view.winner(n) is not None]
    return max(won, key=worth) if won else (0 if view.positions else None)


def _has_true(material: Material, position: int) -> bool:
    """Whether the true next token is in an outcome of the fused distribution."""
    fused, true_id = material.fused, int(material.target.ids[position + 1])
    first = int(fused.parts[:position].sum())
    starts = offsets_of(fused.lengths)
    for part in range(first, first + int(fused.parts[position])):
        translation = material.readings[int(fused.source[part])].translation
        true = _outcome_of(translation, true_id)
        if true in fused.outcomes[starts[part] : starts[part + 1]]:
            return True
    return False


def _read(tokens: Tokens, encoder: Encoder) -> Read:
    ids = tokens.ids.tolist()
    spelled = tuple(encoder.spelled(id_) for id_ in ids)
    return Read(len(ids) > 0, tuple(ids), spelled, tuple(tokens.ends.tolist()))


def _weights(material: Material) -> np.ndarray:
    """[S, N] each source's share of the stored fused distributions."""
    fused, positions = material.fused, len(material.fused.parts)
    weights = np.zeros((len(material.readings), positions))
    part = np.repeat(np.arange(len(fused.lengths)), fused.lengths)
    mass = np.bincount(part, weights=fused.masses, minlength=len(fused.lengths)) + fused.rest
    weights[fused.source, np.repeat(np.arange(positions), fused.parts)] = mass
    return weights


def _cross_entropies(material: Material) -> tuple[np.ndarray, list[float | None]]:
    """([S, N] what sources are compared by, [S] bits per byte of the block)."""
    target, readings, rules = material.target, material.readings, material.rules
    whole = np.array([0, material.size])
    by_byte = np.array([r.nats_by_byte(whole) for r in readings])
    scored = np.isfinite(by_byte)
    nats = np.nan_to_num(by_byte).sum(1)
    bits = [
        float(n / (NATS_PER_BIT * c)) if c else None
        for n, c in zip(nats, scored.sum(1), strict=True)
    ]
    if rules.per_token:
        means = np.concatenate([r.nats_per_token() for r in readings])
        return np.repeat(means[:, None], len(target.predicting), axis=1), bits
    read = np.array([[len(r.tokens.ids) > 0] for r in readings])
    spans = (by_byte, read, target.ends, target.offsets, whole, rules.reach)
    sums, counted = span_nats(*spans)
    return sums / (np.maximum(counted, 1) * NATS_PER_BIT), bits


def _before(material: Material, s: int, position: int) -> Before | None:
    reading, encoder = material.readings[s], material.encoders[s]
    place = int(reading.aligned.source[position])
    if place < 0:
        return None
    translation, given, ends = reading.translation, reading.distributions, reading.tokens.ends
    carried = carry(given, np.array([place]), translation, material.rules.as_authors)
    rows = slice(given.offsets[place], given.offsets[place + 1])
    ids, own = given.ids[rows], given.masses[rows]
    becomes = translation.outcome_of_source[ids]
    entries = tuple(
        Entry(
            int(ids[n]),
            encoder.spelled(int(ids[n])),
            float(own[n]),
            None if becomes[n] < 0 else int(becomes[n]),
        )
        for n in np.lexsort((ids, -own))
    )
    true_id = int(material.target.ids[position + 1])
    until = material.target.ends[position + 1]
    following = range(place + 1, len(ends))
    last = next((j for j in following if ends[j] >= until), len(ends) - 1)
    return Before(
        place,
        tuple(encoder.spelled(int(i)) for i in reading.tokens.ids[place + 1 : last + 1]),
        entries,
        reading.healed,
        float(given.tail[place]),
        _outcomes(material, translation, carried.outcomes, carried.masses, true_id),
        max(float(carried.rest[0] - given.tail[place]), 0.0),
        _outcome_of(translation, true_id),
    )


def _shares(material: Material, weights: np.ndarray, position: int) -> tuple[Share, ...]:
    fused = material.fused
    first = int(fused.parts[:position].sum())
    starts = offsets_of(fused.lengths)
    true_id = int(material.target.ids[position + 1])
    found = []
    for part in range(first, first + int(fused.parts[position])):
        rows = slice(starts[part], starts[part + 1])
        source = int(fused.source[part])
        translation = material.readings[source].translation
        outcomes = _outcomes(
            material, translation, fused.outcomes[rows], fused.masses[rows], true_id
        )
        weight, rest = float(weights[source, position]), float(fused.rest[part])
        found.append(Share(source, weight, outcomes, rest))
    return tuple(found)


def _outcome_of(translation: VocabularyMap, target_id: int) -> int | None:
    found = int(translation.outcome_of_target[target_id])
    if found < 0:  # tokens that no outcome takes are together one, where outcomes are complete
        return translation.outcomes if translation.complete else None
    return found


def _outcomes(
    material: Material,
    translation: VocabularyMap,
    numbers: np.ndarray,
    masses: np.ndarray,
    true_id: int,
) -> tuple[Outcome, ...]:
    offsets, members = translation.members()
    true = _outcome_of(translation, true_id)

    def spelled(number: int) -> tuple[str, ...]:
        ids = members[offsets[number] : offsets[number + 1]]
        tokens = (material.encoder.spelled(int(id_)) for id_ in ids)
        return tuple(sorted(tokens, key=lambda token: (len(token), token)))

    return tuple(
        Outcome(
            int(numbers[n]),
            spelled(int(numbers[n])),
            float(masses[n]),
            int(numbers[n]) == true,
            int(numbers[n]) == translation.outcomes,
        )
        for n in np.lexsort((numbers, -masses))
    )
