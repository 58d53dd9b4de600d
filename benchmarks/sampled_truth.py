"""What is carried over beside what really follows: continuations sampled from the source.

At a position that both have, so many continuations are sampled from the source, and each is cut by
the target's tokenizer: how often each target token came first is the truth. An arm that reads the
text has another distribution for each continuation; these are averaged over them.

S continuations of K tokens; V the source's vocabulary, U the target's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from arms import LEAST_LOG_PROB, Arm, Model, Reader
from fusellm.arrays.distributions import Kept
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens

_CHUNK = 64
_LEAST_BYTES_BEFORE = 20
_LEAST_KEPT = 0.9
_MOST_TRIES = 60


@dataclass(frozen=True)
class Sampled:
    """Continuations of a text after a position, and what the source said along them.

    Attributes:
        before: the last two source tokens before them.
        read: the last target token before them.
        length: bytes of the last source token before them.
        drawn: [S, K] source tokens.
        first: [S] the target's first token of each.
        log_p: [S, K, V] of each drawn token.
        log_p_before: [V] of the last token before them.
    """

    before: np.ndarray
    read: int
    length: int
    drawn: np.ndarray
    first: np.ndarray
    log_p: torch.Tensor
    log_p_before: torch.Tensor


class Distances(NamedTuple):
    """Total variations, each a mean over two halves of a sample: an arm's average over one half to
    how often each token came in the other half. An outcome of several tokens is shared among them

        shared    as often as they came in the arm's own half
        resolved  as the arm itself has them apart in its average, evenly where it never does: what
                  its outcomes never tell apart counts
    """

    shared: float
    resolved: float


@torch.no_grad()
def continuations(
    source: Model, ids: np.ndarray, count: int, steps: int
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """(drawn tokens [S, K], log-probabilities [S, K, V] at each, [V] at the prefix' last token)."""
    size = len(source.encoder.vocabulary)
    found = source.network(torch.from_numpy(ids)[None], use_cache=True)
    cache = found.past_key_values
    log_p = torch.log_softmax(found.logits[0, :, :size], -1)
    before, now = log_p[-2], log_p[-1].expand(count, -1)
    cache.batch_repeat_interleave(count)
    drawn, said = [], torch.empty(count, steps, size)
    for step in range(steps):
        said[:, step] = now
        drawn.append(torch.multinomial(now.exp(), 1))
        if step < steps - 1:
            found = source.network(drawn[-1], past_key_values=cache, use_cache=True)
            now = torch.log_softmax(found.logits[:, -1, :size], -1)
    return torch.cat(drawn, dim=1).numpy(), said, before


def sampled(
    source: Model, target: Reader, text: bytes, mine: Tokens, place: tuple[int, int], count: int
) -> Sampled | None:
    """Continuations of 8 tokens after a position; None where the target cuts the text otherwise.

    Of bytes that are no text, and where the target has no boundary at the position any more, a
    continuation is left out.

    Args:
        text: up to the position.
        mine: the text as the source reads it.
        place: the source's position, and the target's last token.
    """
    j, read = place
    drawn, log_p, before = continuations(source, mine.ids[: j + 1], count, steps=8)
    first = _first_tokens(source, target, text, drawn)
    stays = np.nonzero(first >= 0)[0]
    if len(stays) < count * _LEAST_KEPT:
        return None
    return Sampled(
        mine.ids[j - 1 : j + 1],
        read,
        int(source.encoder.vocabulary.lengths[mine.ids[j]]),
        drawn[stays],
        first[stays],
        log_p[torch.from_numpy(stays)],
        before,
    )


def _first_tokens(source: Model, target: Reader, before: bytes, drawn: np.ndarray) -> np.ndarray:
    """[S] the target's first token of each continuation; -1 where it cannot be told."""
    known, eos = source.encoder.vocabulary.token_bytes, source.encoder.vocabulary.eos_id
    texts, ended = [], []
    for ids in drawn.tolist():
        ended.append(eos in ids)
        after = b"".join(known[id_] or b"" for id_ in (ids[: ids.index(eos)] if ended[-1] else ids))
        text = (before + after).decode("utf-8", "ignore")
        broken = not (before + after).startswith(text.encode())
        texts.append("" if broken else text)
    found = np.full(len(texts), -1, dtype=np.int64)
    for n, block in enumerate(target.encoder.encode(texts, ended)):
        if block.ends is None or not texts[n]:
            continue
        at = int(np.searchsorted(block.ends, len(before), side="right"))
        if at == len(block.ends) and ended[n] and len(texts[n].encode()) == len(before):
            at -= 1  # its EOS
        if 0 < at < len(block.ends) and block.ends[at - 1] == len(before):
            found[n] = block.ids[at]
    return found


def _kept_along(found: Sampled, which: np.ndarray, lengths: np.ndarray) -> Kept:
    """Distributions of the blocks of some continuations, each of so many tokens behind two.

    Whole at the position and one token before it; further on without what is next to impossible.
    """
    rows, true, whole = [], [], []
    for n, length in zip(which.tolist(), lengths.tolist(), strict=True):
        rows += [found.log_p_before[None], found.log_p[n, :length]]
        true += [found.before[1:], found.drawn[n, :length]]
        whole.append(np.arange(length + 1) < 2)
    log_p, ids = torch.cat(rows), torch.from_numpy(np.concatenate(true))
    stays = log_p > LEAST_LOG_PROB
    stays[torch.from_numpy(np.concatenate(whole))] = True
    at = stays.nonzero()
    return Kept(
        offsets_of(stays.sum(1).numpy()),
        at[:, 1].numpy(),
        log_p[at[:, 0], at[:, 1]].numpy(),
        np.zeros(0, dtype=np.uint8),
        np.zeros(len(log_p), dtype=np.float32),
        log_p[torch.arange(len(ids)), ids].numpy(),
    )


def carried(arm: Arm, source: Model, target: Reader, found: Sampled, which: np.ndarray) -> Fused:
    """An arm's distributions at the position, with each of some continuations as the text."""
    known, eos = source.encoder.vocabulary.lengths, source.encoder.vocabulary.eos_id
    ended = (found.drawn[which] == eos).cumsum(1)
    lengths = np.minimum((ended == 0).sum(1) + 1, found.drawn.shape[1])
    blocks = [
        np.concatenate([found.before, found.drawn[n, :length]])
        for n, length in zip(which.tolist(), lengths.tolist(), strict=True)
    ]
    ends = [np.cumsum(np.concatenate([[0], known[block[1:]]])) for block in blocks]
    mine = Tokens(offsets_of(lengths + 2), np.concatenate(blocks), np.concatenate(ends))
    ids = np.stack([np.full(len(which), found.read), found.first[which]], axis=1).reshape(-1)
    begin = np.full(len(which), found.length)
    end = begin + target.encoder.vocabulary.lengths[found.first[which]]
    theirs = Tokens(
        np.arange(0, 2 * len(which) + 1, 2), ids, np.stack([begin, end], axis=1).reshape(-1)
    )
    return arm.fused(theirs, mine, _kept_along(found, which, lengths))[0]


def averages(
    arm: Arm, source: Model, target: Reader, found: Sampled
) -> tuple[np.ndarray, np.ndarray]:
    """([2, sets] mean mass of each outcome over each half, [2] what is in none)."""
    sets = len(arm.pairing.sets)
    sums, rest, counts = np.zeros((2, sets)), np.zeros(2), np.zeros(2)
    every = np.arange(len(found.first)) if arm.reads_the_text else np.zeros(1, dtype=np.int64)
    for start in range(0, len(every), _CHUNK):
        which = every[start : start + _CHUNK]
        fused = carried(arm, source, target, found, which)
        for half in (0, 1):
            mine = np.nonzero((which % 2 == half)[np.repeat(np.arange(len(which)), fused.parts)])[0]
            inside = (which % 2 == half)[np.nonzero(fused.parts)[0]][fused.part_of_outcome]
            sums[half] += np.bincount(
                fused.outcomes[inside], weights=fused.masses[inside], minlength=sets
            )
            rest[half] += fused.rest[mine].sum()
            counts[half] += len(mine)
    if not arm.reads_the_text:
        sums[1], rest[1], counts[1] = sums[0], rest[0], counts[0]
    whole = np.maximum(counts, 1)
    return sums / whole[:, None], rest / whole


def over_tokens(arm: Arm, masses: np.ndarray, rest: float, weights: np.ndarray) -> np.ndarray:
    """[U + 1] masses of outcomes as masses of target tokens; what is none's comes last.

    Args:
        weights: [U] by which an outcome is shared among its tokens; evenly where none has any.
    """
    sets, size = arm.pairing.sets, len(arm.pairing.sets.ids)
    numbers = np.nonzero(masses > 0)[0]
    ids, which = sets.take(numbers)
    mine = weights[ids].astype(np.float64)
    whole = np.bincount(which, weights=mine, minlength=len(numbers))
    evenly = 1 / np.maximum(np.bincount(which, minlength=len(numbers)), 1)
    share = np.where(whole[which] > 0, mine / np.maximum(whole[which], 1e-300), evenly[which])
    spread = np.bincount(ids, weights=masses[numbers][which] * share, minlength=size + 1)
    without = np.nonzero(arm.map.outcome_of_target < 0)[0]
    if arm.map.complete and len(without):
        mine = weights[without].astype(np.float64)
        mine = mine if mine.sum() > 0 else np.ones(len(without))
        spread[without] += rest * mine / mine.sum()
    else:
        spread[size] += rest
    return spread


def distances(arm: Arm, source: Model, target: Reader, found: Sampled) -> Distances:
    """An arm's average over each half of the continuations beside the other half."""
    size = len(target.encoder.vocabulary)
    masses, rest = averages(arm, source, target, found)
    came = _came(found, size)
    apart = np.zeros((2, 2))
    for half in (0, 1):
        other = came[1 - half] / came[1 - half].sum()
        alone = _alone(arm, masses[half])
        for n, weights in enumerate((came[half], alone)):
            said = over_tokens(arm, masses[half], float(rest[half]), weights)
            apart[n, half] = _variation(said, np.append(other, 0.0))
    return Distances(*(float(value) for value in apart.mean(axis=1)))


def _alone(arm: Arm, masses: np.ndarray) -> np.ndarray:
    """[U] mass of each token as an outcome of its own."""
    sets = arm.pairing.sets
    single = sets.stops - sets.starts == 1
    ids = sets.ids[sets.starts[single]]
    return np.bincount(ids, weights=masses[single], minlength=len(sets.ids))


def _came(found: Sampled, size: int) -> np.ndarray:
    """[2, U] how often each token came first, by half."""
    return np.stack([np.bincount(found.first[half::2], minlength=size) for half in (0, 1)])


def noise_of(found: Sampled, size: int) -> float:
    """Total variation between the two halves."""
    came = _came(found, size)
    return _variation(came[0] / came[0].sum(), came[1] / came[1].sum())


def _variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum() / 2)


def truth(
    source: Model,
    target: Reader,
    names: Sequence[str],
    texts: Sequence[str],
    positions: int,
    samples: int,
    numbers_only: bool,
) -> dict[str, float]:
    """Mean distances by arm, and over the mean noise.

    Args:
        numbers_only: at positions before a token with a digit, and behind a digit.
    """
    chance = np.random.default_rng(0)
    torch.manual_seed(0)
    encoders = source.encoder, target.encoder
    arms = [Arm.between(name, *encoders).by_boundaries(*encoders) for name in names]
    align = Arm.between("partition", *encoders).pairing.aligner
    noise: list[float] = []
    by_arm: dict[str, list[Distances]] = {name: [] for name in names}
    for _ in range(positions * _MOST_TRIES):
        if len(noise) == positions:
            break
        text = texts[int(chance.integers(len(texts)))]
        mine, theirs = source.tokens(text), target.tokens(text)
        if mine is None or theirs is None:
            continue
        aligned = align(theirs, mine).source
        at = [
            n
            for n in np.nonzero(aligned >= 1)[0].tolist()
            if _is_asked(theirs, n, text, numbers_only)
        ]
        if not at:
            continue
        n = int(chance.choice(at))
        before, place = text.encode()[: theirs.ends[n]], (int(aligned[n]), int(theirs.ids[n]))
        found = sampled(source, target, before, mine, place, samples)
        if found is None:
            continue  # the text is cut otherwise once something follows it
        noise.append(noise_of(found, len(target.encoder.vocabulary)))
        for arm in arms:
            by_arm[arm.name].append(distances(arm, source, target, found))
    figures = {"noise": float(np.mean(noise)), "positions": float(len(noise))}
    for name, several in by_arm.items():
        shared, resolved = (float(np.mean(column)) for column in zip(*several, strict=True))
        figures |= {f"{name} tv": shared, f"{name} tv_resolved": resolved}
        figures[f"{name} tv_over_noise"] = shared / figures["noise"]
        figures[f"{name} tv_resolved_over_noise"] = resolved / figures["noise"]
    return figures


def _is_asked(theirs: Tokens, n: int, text: str, numbers_only: bool) -> bool:
    """Whether a position is well inside the text, and at a number where these are asked for."""
    begin, end = int(theirs.ends[n]), int(theirs.ends[n + 1])
    if begin <= _LEAST_BYTES_BEFORE or end == begin or begin == theirs.ends[-1]:
        return False
    near = text.encode()[begin - 1 : end]
    return not numbers_only or any(byte in b"0123456789" for byte in near)
