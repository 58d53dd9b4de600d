"""Fused distributions of many blocks from the distributions of all sources.

S sources; B blocks, one after another in flat arrays with offsets; N target positions that
predict, L bytes, in all. A part is one source's share of the fused
distribution at one position: R parts, M outcomes in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import Aligned
from fusellm.alignment.translation import VocabularyMap
from fusellm.alignment.written_on import WrittenOn
from fusellm.arrays.distributions import Distributions
from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import places_by_group
from fusellm.arrays.tokens import Tokens
from fusellm.config import FusionSettings
from fusellm.fusion.carry import Carried, carry, map_counts
from fusellm.fusion.cross_entropy import NATS_PER_BIT, nats_by_byte, span_nats
from fusellm.fusion.functions import FUNCTIONS, Compared
from fusellm.fusion.refine import is_split, paths_of, refine


@dataclass(frozen=True)
class Reading:
    """One source's reading of the blocks.

    Attributes:
        tokens: its tokens and their boundaries.
        distributions: at all but each block's last position.
        true_log_prob: at the same positions, nats of the true next token.
        translation: its vocabulary map.
        aligned: which of its positions belongs to each target position.
        healed: whether its tokens were healed; those of a source that cuts as the target are not.
        stored: the distributions as they were read, and
        tree: by which classes are split along the text; None where they are not.
        told_inside: [N] rows of the distributions at positions within its tokens, behind those of
            its own positions; -1 elsewhere. None for none.
    """

    tokens: Tokens
    distributions: Distributions
    true_log_prob: np.ndarray
    translation: VocabularyMap
    aligned: Aligned
    healed: bool = False
    stored: Distributions | None = None
    tree: WrittenOn | None = None
    told_inside: np.ndarray | None = None

    def rows(self, block: np.ndarray) -> np.ndarray:
        """[N] the row of its distributions at each target position; -1 for none.

        Args:
            block: [N] the block of each.
        """
        place = self.aligned.source
        rows = np.where(place >= 0, self.tokens.position_offsets[block] + place, -1)
        return rows if self.told_inside is None else np.maximum(rows, self.told_inside)

    @property
    def sets(self) -> OutcomeSets:
        """The outcomes that its distributions are over, as sets of target ids."""
        return self.translation.sets if self.tree is None else self.tree.sets

    def nats_by_byte(self, byte_offsets: np.ndarray) -> np.ndarray:
        """[L] float64 nats by byte; `byte_offsets` [B+1] says where each block's bytes are."""
        tokens = self.tokens
        where = tokens.offsets, self.true_log_prob, byte_offsets
        return nats_by_byte(tokens.ends, *where, tokens.prefix_tokens)

    def nats_per_token(self) -> np.ndarray:
        """[B] float64 mean nats of each block's tokens, without its prefix."""
        offsets, asked = self.tokens.position_offsets, self.tokens.asked
        nats = np.where(asked, -self.true_log_prob.astype(np.float64), 0.0)
        sums, counts = (np.concatenate([[0], np.cumsum(values)]) for values in (nats, asked))
        per_block = sums[offsets[1:]] - sums[offsets[:-1]]
        return np.asarray(per_block / np.maximum(counts[offsets[1:]] - counts[offsets[:-1]], 1))


@dataclass(frozen=True)
class FusionRules:
    """How distributions become one.

    Attributes:
        function: the fusion function.
        reach: bytes to each side over which sources are compared; None for whole blocks.
        hindsight: whether what comes after a position counts in that.
        per_token: compare nats per token over the block (the authors), not bits per byte.
        beta: sharpness of `avgce`.
        as_authors: the authors' rules for collisions (the first id keeps its place, the others
            are dropped) and for positions that are not aligned (all mass on the token just read).
        referees: places of the sources that are compared and never taught.
    """

    function: Callable[[Compared], np.ndarray]
    reach: int | None = None
    hindsight: bool = True
    per_token: bool = False
    beta: float = 1.0
    as_authors: bool = False
    referees: tuple[int, ...] = ()


def rules_of(settings: FusionSettings, referees: Sequence[bool] = ()) -> FusionRules:
    """How distributions become one, by a recipe's settings.

    Args:
        referees: of each source, whether it is one.
    """
    return FusionRules(
        FUNCTIONS[settings.function],
        settings.window_bytes if settings.granularity == "window" else None,
        settings.hindsight,
        settings.cross_entropy == "nats_per_token",
        settings.beta,
        settings.compatibility == "paper",
        tuple(n for n, is_one in enumerate(referees) if is_one),
    )


Counts = dict[str, np.ndarray]
"""By name [B], sums over those of a block's positions that predict text or EOS.

Of each source: `read` (1 for a block that it read), positions per situation by its name,
`aligned`, `first_positions` left out, `mass_kept` and `mass_carried` over aligned positions, `met`
entries that met another in an outcome, `nats` against the text, the `scored_bytes` these are over,
and `wins`, its weights, or of a referee the positions that it kept all others from. Of all sources
together: `blocks`, `positions`, `without_source` and `ties`.
"""


def fuse_blocks(
    target: Tokens,
    byte_offsets: np.ndarray,
    sources: Sequence[Reading],
    rules: FusionRules,
    routed: np.ndarray | None = None,
) -> tuple[Fused, Counts, list[Counts]]:
    """Translate and fuse blocks.

    Args:
        target: the blocks as the target reads them.
        byte_offsets: [B+1] where each block's bytes are.
        sources: one or more, in the recipe's order.
        routed: [B] number of the source that `route` gives a block to; -1 for none.

    Returns:
        (fused distributions, counts of all sources together, counts of each source)
    """
    read = np.array([np.diff(s.tokens.offsets) > 0 for s in sources])
    read &= np.diff(target.offsets) > 0
    by_byte = np.array([s.nats_by_byte(byte_offsets) for s in sources])
    block = np.repeat(np.arange(read.shape[1]), np.diff(target.position_offsets))
    aligned = np.array([s.rows(block) >= 0 for s in sources])
    if rules.as_authors:
        aligned = read[:, block] & ~_stopped(target, byte_offsets, sources, block)
    compared = compare(target, byte_offsets, sources, rules, by_byte, read, block, aligned)
    compared = replace(compared, routed=None if routed is None else routed[block])
    heard = replace(compared, aligned=_heard(compared, rules.referees))
    weights = rules.function(heard)
    fused = _gather(target, sources, rules, weights, block)
    wins = weights + _ruled(compared, heard.aligned, rules.referees)
    each = [
        _counts_of(source, read[s], by_byte[s], wins[s], byte_offsets, block, target.asked)
        for s, source in enumerate(sources)
    ]
    return fused, _counts_of_all(target, heard, wins, block), each


def _heard(compared: Compared, referees: Sequence[int]) -> np.ndarray:
    """[S, N] bool: the sources that are aligned and cost less than every referee that is."""
    if not referees:
        return compared.aligned
    cost = np.where(compared.aligned, compared.cross_entropy, np.inf)
    heard = cost < cost[list(referees)].min(axis=0)
    heard[list(referees)] = False
    return np.asarray(heard)


def _ruled(compared: Compared, heard: np.ndarray, referees: Sequence[int]) -> np.ndarray:
    """[S, N] one where a referee of least cost keeps all sources from being heard, else 0."""
    ruled = np.zeros(heard.shape)
    if referees:
        cost = np.where(compared.aligned, compared.cross_entropy, np.inf)
        would_teach = np.delete(compared.aligned, list(referees), axis=0).any(axis=0)
        at = np.flatnonzero(would_teach & ~heard.any(axis=0))
        ruled[np.array(referees)[cost[list(referees)][:, at].argmin(axis=0)], at] = 1.0
    return ruled


def compare(
    target: Tokens,
    byte_offsets: np.ndarray,
    sources: Sequence[Reading],
    rules: FusionRules,
    by_byte: np.ndarray,
    read: np.ndarray,
    block: np.ndarray,
    aligned: np.ndarray,
) -> Compared:
    """What sources are compared by at each position.

    Args:
        by_byte: [S, L] each source's `nats_by_byte`.
        read: [S, B] bool, whether a source and the target have read a block.
        block: [N] the block of each position.
        aligned: [S, N] bool, whether a source has a distribution at a position.
    """
    where = (by_byte, read, target.ends, target.offsets, byte_offsets)
    stopped = _stopped(target, byte_offsets, sources, block)
    per_token = np.array([source.nats_per_token()[block] for source in sources])
    if rules.per_token:
        cross_entropy = per_token
    else:
        nats, scored = span_nats(*where, rules.reach, rules.hindsight, stopped)
        cross_entropy = nats / (np.maximum(scored, 1) * NATS_PER_BIT)
    next_nats = span_nats(*where, 0, stopped=stopped)[0]
    so_far = span_nats(*where, None, hindsight=False, stopped=stopped)[0]
    return Compared(aligned, cross_entropy, per_token, next_nats, so_far, None, rules.beta)


def _stopped(
    target: Tokens, byte_offsets: np.ndarray, sources: Sequence[Reading], block: np.ndarray
) -> np.ndarray:
    """[S, N] bool, where a source has read no further than some byte before the block's end.

    So it is with a conversation that is longer than its context.
    """
    boundary, lengths = target.ends[target.predicting], np.diff(byte_offsets)
    stopped = np.zeros((len(sources), len(boundary)), dtype=np.bool_)
    for s, source in enumerate(sources):
        offsets, ends = source.tokens.offsets, source.tokens.ends
        there = np.diff(offsets) > 0
        until = lengths.copy()
        until[there] = ends[offsets[1:][there] - 1]
        cut = until < lengths
        stopped[s] = cut[block] & (boundary >= until[block])
    return stopped


def _gather(
    target: Tokens,
    sources: Sequence[Reading],
    rules: FusionRules,
    weights: np.ndarray,
    block: np.ndarray,
) -> Fused:
    position, source = np.nonzero(weights.T > 0)
    carried = [
        carry_to(target, reading, rules, block, position[source == s])
        for s, reading in enumerate(sources)
    ]
    whole = Carried.concat(carried).take(places_by_group(source))
    weight = weights[source, position]
    return Fused(
        np.bincount(position, minlength=weights.shape[1]).astype(np.uint8),
        source.astype(np.int8),
        whole.lengths,
        whole.outcomes,
        (whole.masses * np.repeat(weight, whole.lengths)).astype(np.float32),
        (whole.rest * weight).astype(np.float32),
    )


def carry_to(
    target: Tokens, reading: Reading, rules: FusionRules, block: np.ndarray, positions: np.ndarray
) -> Carried:
    """What a source says at some target positions, over the outcomes of its pairing.

    Where it is not aligned, all mass goes to the token just read (the authors' rule).

    Args:
        block: [N] the block of each position.
    """
    rows = reading.rows(block)[positions]
    there = rows >= 0
    rows = rows[there]
    if reading.tree is None:
        carried = carry(reading.distributions, rows, reading.translation, rules.as_authors)
    else:
        carried = _carry_along(target, reading, reading.tree, rows, positions[there], block)
    if there.all():
        return carried
    token = target.ids[target.predicting[positions[~there]]]
    return Carried.concat([carried, Carried.certain(token)]).take(places_by_group(~there))


def _carry_along(
    target: Tokens,
    reading: Reading,
    tree: WrittenOn,
    rows: np.ndarray,
    positions: np.ndarray,
    block: np.ndarray,
) -> Carried:
    """What a source says at some positions, the class of the text split where it has a path."""
    tokens, given, map_ = reading.tokens, reading.distributions, reading.translation
    stored = given if reading.stored is None else reading.stored
    own = np.flatnonzero(rows < len(stored.tail))  # and not within a token
    paths = paths_of(target, tokens, rows[own], positions[own], block[positions[own]])
    splits = is_split(paths, tokens, map_, tree)
    split = np.zeros(len(rows), dtype=np.bool_)
    split[own[splits]] = True
    whole = carry(given, rows[~split], map_, first_only=False)
    log_prob = reading.true_log_prob
    refined = refine(paths.take(splits), tokens, given, stored, log_prob, map_, tree)
    return Carried.concat([whole, refined]).take(places_by_group(split))


def _counts_of(
    source: Reading,
    read: np.ndarray,
    by_byte: np.ndarray,
    weights: np.ndarray,
    byte_offsets: np.ndarray,
    block: np.ndarray,
    asked: np.ndarray,
) -> Counts:
    blocks = len(read)
    rows = source.rows(block)
    there = rows >= 0
    mapped = map_counts(source.distributions, rows[there], source.translation)
    byte_block = np.repeat(np.arange(blocks), np.diff(byte_offsets))
    sums = {
        "mass_kept": (block[there], mapped.kept),
        "mass_carried": (block[there], mapped.carried),
        "met": (block[there], mapped.met),
        "aligned": (block, there),
        "first_positions": (block, source.aligned.first),
        "wins": (block, weights),
        "nats": (byte_block, np.nan_to_num(by_byte)),
        "scored_bytes": (byte_block, np.isfinite(by_byte)),
    } | {s.name.lower(): (block, asked & (source.aligned.situations == s)) for s in Situation}
    counts = {n: np.bincount(at, weights=v, minlength=blocks) for n, (at, v) in sums.items()}
    return counts | {"read": read.astype(np.float64)}


def _counts_of_all(
    target: Tokens, compared: Compared, wins: np.ndarray, block: np.ndarray
) -> Counts:
    blocks = len(target.offsets) - 1
    cost = np.where(compared.aligned, compared.cross_entropy, np.inf)
    least = cost.min(axis=0, initial=np.inf)
    tied = ((cost == least) & compared.aligned).sum(axis=0) > 1
    alone = target.asked & ~(compared.aligned.any(axis=0) | (wins > 0).any(axis=0))
    return {
        "blocks": np.ones(blocks),
        "positions": np.bincount(block, weights=target.asked, minlength=blocks),
        "without_source": np.bincount(block, weights=alone, minlength=blocks),
        "ties": np.bincount(block, weights=tied, minlength=blocks),
    }
