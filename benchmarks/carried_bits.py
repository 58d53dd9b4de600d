"""Bits of the true next target token: what the source gave them, what is carried over of them.

N positions; T target tokens, V the target's vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from arms import Arm, Model, Reader, blocks_of, kept_of
from fusellm.alignment.positions import Situation
from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.tokens import Tokens
from kinds_of_text import Kind, kinds_of_spans

Row = dict[str, float | str]
_LEAST = 1e-12
EVERYTHING = "all"


class Positions(NamedTuple):
    """What was found at aligned positions, [N] each: bits, bytes, and the groups they are in."""

    situation: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    own: np.ndarray
    carried: np.ndarray
    lost: np.ndarray

    @classmethod
    def concat(cls, several: Sequence["Positions"]) -> "Positions":
        return cls(*(np.concatenate(columns) for columns in zip(*several, strict=True)))


@dataclass(frozen=True)
class Frequencies:
    """How often each target token came, in the order of some sets' ids.

    Attributes:
        of_id: [V] a little more than the count.
        sums: [V+1] cumulated in the sets' order.
        rank: [V] where each id is in that order.
    """

    of_id: np.ndarray
    sums: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, counted: np.ndarray, sets: OutcomeSets) -> "Frequencies":
        sums = np.concatenate([[0.0], np.cumsum(counted[sets.ids])])
        return cls(counted, sums, np.argsort(sets.ids))


def bits_of(
    fused: Fused, sets: OutcomeSets, true_ids: np.ndarray, known: Frequencies, complete: bool
) -> tuple[np.ndarray, np.ndarray]:
    """([N] bits of the outcome that has the true id, [N] bits that say which of it it is).

    Of an id that is in no outcome of its position: where the outcomes are complete, the others are
    one more outcome, which has the rest; otherwise the rest is spread evenly over them.

    Args:
        fused: one source's distributions at N positions.
    """
    part, outcomes = fused.part_of_outcome, fused.outcomes
    begin, end = sets.starts[outcomes], sets.stops[outcomes]
    rank = known.rank[true_ids][part]
    has = (begin <= rank) & (rank < end)
    mass, within, weight, listed = (
        np.bincount(part[which], weights=values[which], minlength=len(true_ids))
        for which, values in (
            (has, fused.masses.astype(np.float64)),
            (has, known.sums[end] - known.sums[begin]),
            (slice(None), known.sums[end] - known.sums[begin]),
            (slice(None), (end - begin).astype(np.float64)),
        )
    )
    frequency = known.of_id[true_ids]
    in_one = np.bincount(part[has], minlength=len(true_ids)) > 0
    if complete:
        mass, within = np.where(in_one, mass, fused.rest), np.where(in_one, within, 0)
        within = np.where(in_one, within, known.sums[-1] - weight)
    else:
        others = np.maximum(len(known.of_id) - listed, 1)
        mass = np.where(in_one & (mass > 0), mass, fused.rest / others)
        within = np.where(in_one, within, frequency)
    lost = np.log2(np.maximum(within, frequency) / frequency)
    return -np.log2(np.maximum(mass, _LEAST)), lost


def own_bits(log_p: torch.Tensor, tokens: Tokens, spans: np.ndarray) -> np.ndarray:
    """[N] bits of the source over byte spans [N, 2], each token's spread over its bytes."""
    true = -log_p[torch.arange(len(log_p) - 1), torch.from_numpy(tokens.ids[1:])].numpy()
    ends, lengths = tokens.ends, np.diff(tokens.ends)
    by_byte = np.zeros(int(ends[-1]))
    for n in np.nonzero(lengths)[0]:
        by_byte[ends[n] : ends[n + 1]] = true[n] / lengths[n] / math.log(2)
    sums = np.concatenate([[0.0], np.cumsum(by_byte)])
    return np.asarray(sums[spans[:, 1]] - sums[spans[:, 0]])


def measured(
    source: Model, target: Reader, arms: Sequence[Arm], domain: str, most_bytes: int
) -> tuple[dict[str, Positions], np.ndarray]:
    """(by arm what was found, [all positions that predict text] their kinds)."""
    texts = blocks_of(domain, most_bytes)
    read = [(text, source.tokens(text), target.tokens(text)) for text in texts]
    both = [(text, mine, theirs) for text, mine, theirs in read if mine and theirs]
    counted = np.bincount(
        np.concatenate([np.zeros(0, np.int64), *(theirs.ids for _, _, theirs in both)]),
        minlength=len(target.encoder.vocabulary),
    )
    known = {arm.name: Frequencies.of(counted + 0.1, arm.pairing.sets) for arm in arms}
    found: dict[str, list[Positions]] = {arm.name: [] for arm in arms}
    every = [np.zeros(0, dtype=np.int8)]
    for text, mine, theirs in both:
        spans = np.stack([theirs.ends[:-1], theirs.ends[1:]], axis=1)
        reads = spans[:, 1] > spans[:, 0]
        kinds = np.full(len(spans), -1)
        kinds[reads] = kinds_of_spans(text, spans[reads])
        every.append(kinds)
        log_p = source.log_probs(mine.ids)
        kept = kept_of(log_p[:-1], mine.ids[1:])
        for arm in arms:
            fused, reading = arm.fused(theirs, mine, kept)
            at = np.nonzero((fused.parts > 0) & reads)[0]
            if not len(at):
                continue
            taken, true_ids = fused.take(at), theirs.ids[1:][at]
            complete = arm.map.complete
            bits = bits_of(taken, arm.pairing.sets, true_ids, known[arm.name], complete)
            own, sizes = own_bits(log_p, mine, spans[at]), spans[at, 1] - spans[at, 0]
            where = reading.aligned.situations[at], kinds[at]
            found[arm.name].append(Positions(*where, sizes, own, *bits))
    return {
        name: Positions.concat(several) for name, several in found.items() if several
    }, np.concatenate(every)


def rows_of(domain: str, arm: str, found: Positions, every: np.ndarray) -> Iterator[Row]:
    """Figures of an arm: of all positions, by situation and by kind of text.

    Args:
        every: kinds of all positions. A kind's share is of its own positions.
    """
    groups = {EVERYTHING: (np.ones(len(found.size), bool), len(every))}
    for situation in Situation:
        groups[situation.name.lower()] = found.situation == situation, len(every)
    for kind in Kind:
        groups[kind.label] = found.kind == kind, int((every == kind).sum())
    for group, (mine, positions) in groups.items():
        size = found.size[mine].sum()
        if not size:
            continue
        own, carried, lost = (
            float(column[mine].sum() / size) for column in (found.own, found.carried, found.lost)
        )
        yield {
            "domain": domain,
            "arm": arm,
            "group": group,
            "share": float(mine.sum() / positions),
            "bytes": float(size),
            "own": own,
            "carried": carried,
            "lost": lost,
            "gap": carried + lost - own,
        }


def measure(
    source: Model, target: Reader, names: Sequence[str], domains: Sequence[str], most_bytes: int
) -> list[Row]:
    """Rows of figures by domain, arm and group; of all domains together last."""
    arms = [Arm.between(name, source.encoder, target.encoder) for name in names]
    rows: list[Row] = []
    whole: Mapping[str, list[Positions]] = {name: [] for name in names}
    kinds = []
    for domain in domains:
        found, every = measured(source, target, arms, domain, most_bytes)
        kinds.append(every)
        for name, positions in found.items():
            rows += rows_of(domain, name, positions, every)
            whole[name].append(positions)
    if len(domains) > 1:
        for name, several in whole.items():
            if several:
                joined = Positions.concat(several)
                rows += rows_of(EVERYTHING, name, joined, np.concatenate(kinds))
    return rows
