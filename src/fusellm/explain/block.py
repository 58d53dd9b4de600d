"""One block of a run as data: what each model read, and what became of it at each position.

This is what `fusellm inspect` shows. Nothing is computed here that fusion does not compute, nothing
is written, and no model is loaded: tokenizers only.

T tokens of one model's reading; N target positions that predict; S sources, in the recipe's order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.alignment.positions import Situation
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.config import Recipe
from fusellm.errors import StoreError
from fusellm.explain.answer import Looked
from fusellm.explain.grid import Strip
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.fusion.fuse import FusionRules, Reading, carry_to, compare, rules_of
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.stages.fuse import pairings_of
from fusellm.store import blocks as corpus_store
from fusellm.store import externalized as source_store
from fusellm.store import fused as fused_store
from fusellm.store.externalized import TARGET
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.tokens.encode import Encoder

_PART = "train"  # that sources read; validation and held_out are kept from them
_SETTINGS = (
    *("strategy", "compatibility", "token_healing", "inside_tokens", "function"),
    *("granularity", "window_bytes", "hindsight", "cross_entropy"),
)


@dataclass(frozen=True)
class ModelTokens:
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

    @property
    def strip(self) -> Strip:
        """Its row in a grid of boundaries."""
        strip = Strip(self.ends)
        return Strip(self.ends, {n: self.spelled[n] for n, a, b in strip.tokens() if a == b})


@dataclass(frozen=True)
class SourceView:
    """One source's part in a block.

    Attributes:
        name: the source's.
        tokens: its reading.
        positions: [N] the place of its aligned position, -1 for none.
        situations: [N] names of `Situation` in lower case: by boundaries, whatever the alignment.
        weights: [N] its share of the fused distributions, rounded as stored; 0 where it has none.
        cross_entropy: [N] by which sources are compared there; the recipe says in what.
        bits_per_byte: over the block's bytes that it scored; None where it did not read it.
        referee: whether it is compared and never taught.
    """

    name: str
    tokens: ModelTokens
    positions: tuple[int, ...]
    situations: tuple[str, ...]
    weights: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    bits_per_byte: float | None
    referee: bool


@dataclass(frozen=True)
class Entry:
    """A kept token: `outcome` is the number of what it becomes, None for nothing."""

    id: int
    spelled: str
    probability: float
    outcome: int | None


@dataclass(frozen=True)
class OutcomeView:
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
        source: its name.
    """

    place: int
    next_spelled: tuple[str, ...]
    kept: tuple[Entry, ...]
    healed: bool
    tail: float
    becomes: tuple[OutcomeView, ...]
    nowhere: float
    true_outcome: int | None
    source: str


@dataclass(frozen=True)
class Share:
    """One source's part of the fused distribution; with `rest` it sums to `weight`."""

    source: str
    weight: float
    outcomes: tuple[OutcomeView, ...]
    rest: float


@dataclass(frozen=True)
class PositionView:
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
        block: its number, of the part that sources read; `blocks` is how many that has.
        document, domain: what it is from.
        bytes: of its text in UTF-8.
        recipe: the settings by which its distributions were made and fused.
        positions: N.
        winners: [N] name of the source of most weight, of equals the first; None for none.
        at: the chosen position; None where the block has none.
        answer: of a conversation, the answer that is shown, from 0, and `answers` how many are
            learnt; text, bytes and positions are that answer's.
        asked: what the target has read since the answer before, its template included.
    """

    block: int
    blocks: int
    document: str
    domain: str
    bytes: int
    text: str
    recipe: dict[str, Any]
    positions: int
    target: ModelTokens
    sources: tuple[SourceView, ...]
    winners: tuple[str | None, ...]
    at: PositionView | None
    answer: int | None = None
    answers: int = 0
    asked: str = ""

    @property
    def is_split(self) -> bool:
        """Whether several sources have a share in one distribution."""
        shares = zip(*(source.weights for source in self.sources), strict=True)
        return any(sum(weight > 0 for weight in weights) > 1 for weights in shares)

    def silence(self, at: PositionView, s: int) -> str:
        """Why source s says nothing at a position."""
        source = self.sources[s]
        if not source.tokens.read:
            return "could not read this block"
        if source.weights[at.position] > 0 and self.recipe["inside_tokens"]:
            return "not aligned: what it said before its token, of the bytes read since"
        if source.weights[at.position] > 0:
            return "not aligned: by the authors' rule all mass is on the token just read"
        if at.read_bytes not in source.tokens.ends[:-1]:
            return "not aligned: no position of it has read exactly this text"
        if self.recipe["token_healing"] and at.read_bytes > 0:
            return "says only what the target would not cut off here"
        return "not aligned, though it has read this text"


def settings_in_words(recipe: Recipe) -> dict[str, str]:
    """How a run's distributions were kept and fused."""
    fusion, kept = recipe.fusion, recipe.externalize
    side = "to each side" if fusion.hindsight else "before the position"
    over = f"sources compared over a window of {fusion.window_bytes} bytes {side}"
    if fusion.granularity == "block":
        over = f"sources compared over the {'whole block' if fusion.hindsight else 'block so far'}"
    if fusion.function == "bayes":
        over = "sources by their probability, given the block so far"
    if fusion.function == "route":
        over = ", ".join(f"{domain} to {name}" for domain, name in fusion.routes.items())
    scheme = f"{kept.draws} draws" if kept.scheme == "sampled" else f"top {kept.k}"
    rules = [
        *([", healed"] if fusion.heals else []),
        *([", split along the text"] if fusion.refines else []),
        *([", asked within tokens"] if fusion.inside_tokens else []),
    ]
    paper = ", as the authors" if fusion.compatibility == "paper" else ""
    return {
        "strategy": f"{fusion.strategy}{paper}{''.join(rules)}",
        "function": f"{fusion.function}, {over}",
        "kept": f"{scheme} at each position",
    }


def inspect_block(
    recipe: Recipe,
    run: Path,
    readers: Mapping[str, Reader],
    number: int,
    position: int | None,
    progress: Progress,
    answer: int | None = None,
) -> BlockView:
    """Gather one block of the part that sources read.

    Args:
        readers: the sources by name, and the target as "target".
        number: of the block, from 0.
        position: to look at closely, from 0 to N - 1; None takes an instructive one with a fused
            distribution: where the winner cuts what follows otherwise, then where the true next
            token is among its outcomes, then where most sources are aligned; the first of these.
        answer: of a conversation, which of its answers, from 0; the first if None.

    Raises:
        StoreError: a stage is not finished, a tokenizer is not the one it was, or there is no
            such block, answer or position.
    """
    if not (fused_store.fused_folder(run) / MANIFEST).exists():
        raise StoreError(f"{run} has no fused distributions yet; first: fusellm fuse {run}")
    fused, corpus = fused_store.open_fused(run), corpus_store.open_corpus(run)
    encoders: dict[str, Encoder] = {name: reader.encoder for name, reader in readers.items()}
    folders = _folders(recipe, run, readers)
    shard, row, blocks = _place(corpus, number)
    block = corpus_store.read_shard(corpus, shard)[row]
    columns = {
        name: _columns(folder, corpus, shard, row, len(encoders[name].vocabulary))
        for name, folder in folders.items()
    }
    chosen = Looked.of(block, answer)
    read = {name: chosen.tokens(columns[name], encoders[name].prefix_tokens) for name in folders}
    positions = len(read[TARGET].predicting)
    if position is not None and not 0 <= position < positions:
        numbers = f", from 0 to {positions - 1}" if positions else ""
        raise StoreError(
            f"there is no position {position}: block {number} has {positions:,}{numbers}"
        )
    readings = {
        name: pairing.reading(read[TARGET], read[name], chosen.kept(columns[name]))
        for name, pairing in pairings_of(recipe, readers, progress).items()
    }
    stored = _fused(fused, shard, row, columns[TARGET]["ids"].values)
    stored = chosen.fused(stored, columns[TARGET], positions)
    vocabulary = len(encoders[TARGET].vocabulary)
    sets = {name: fused_store.read_sets(fused, name, vocabulary) for name in readings}
    gathered = _Gathered(read, encoders, readings, stored, sets)
    view = _view(recipe, number, blocks, chosen.block, position, gathered)
    if chosen.number is None:
        return view
    said = chosen.asked(columns[TARGET], encoders[TARGET])
    return replace(view, answer=chosen.number, answers=chosen.answers, asked=said)


def _folders(recipe: Recipe, run: Path, readers: Mapping[str, Reader]) -> dict[str, StageFolder]:
    names = (TARGET, *(source.name for source in recipe.sources))
    folders = {name: source_store.open_externalized(run, name) for name in names}
    for name, folder in folders.items():
        if folder.identity.inputs.get("tokenizer") != readers[name].tokenizer_fingerprint:
            raise StoreError(
                f"the tokenizer of {name!r} is not the one that {folder.path} was made with; put "
                f"it back, or make the run anew: fusellm run {run} --redo"
            )
    return folders


@dataclass(frozen=True)
class _Gathered:
    """A block in all stores of a run.

    Attributes:
        read: tokens of the target and the sources by name; `encoders` likewise.
        readings: of the sources by name, in order.
        fused: its fused distributions, as stored, and
        sets: the outcomes of each source there, by name.
    """

    read: Mapping[str, Tokens]
    encoders: Mapping[str, Encoder]
    readings: Mapping[str, Reading]
    fused: Fused
    sets: Mapping[str, OutcomeSets]

    def model_tokens(self, name: str) -> ModelTokens:
        ids, ends = self.read[name].ids.tolist(), self.read[name].ends.tolist()
        return ModelTokens(len(ids) > 0, tuple(ids), self.spelled(name, ids), tuple(ends))

    def spelled(self, name: str, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        return tuple(self.encoders[name].spelled(int(id_)) for id_ in ids)

    def true_id(self, position: int) -> int:
        return int(self.read[TARGET].ids[position + 1])


def _view(
    recipe: Recipe,
    number: int,
    blocks: int,
    block: corpus_store.Block,
    position: int | None,
    gathered: _Gathered,
) -> BlockView:
    fusion, size = recipe.fusion, len(block.text.encode())
    referees = [source.referee for source in recipe.sources]
    rules, target = rules_of(fusion, referees), gathered.model_tokens(TARGET)
    sources = _sources(gathered, rules, size)
    winners = _winners(sources, len(gathered.fused.parts))
    at, chosen = None, _instructive(gathered, sources, winners) if position is None else position
    if chosen is not None:
        before = tuple(_before(gathered, rules, name, chosen) for name in gathered.readings)
        after = (target.ends[chosen], target.spelled[chosen + 1])
        at = PositionView(chosen, *after, before, _shares(gathered, sources, chosen))
    settings = {key: getattr(fusion, key) for key in _SETTINGS} | {
        "token_healing": fusion.heals,
        "refine": fusion.refines,
    }
    return BlockView(
        number,
        blocks,
        block.document,
        block.domain,
        size,
        block.text,
        settings | {"scheme": recipe.externalize.scheme},
        len(winners),
        target,
        sources,
        winners,
        at,
    )


def _place(corpus: StageFolder, number: int) -> tuple[str, int, int]:
    """(shard, row, blocks of the part) of a block."""
    names = shard_names(corpus, f"{_PART}-")
    starts = offsets_of(np.array([corpus.shards[n]["counts"]["blocks"] for n in names]))
    blocks = int(starts[-1])
    if not 0 <= number < blocks:
        raise StoreError(
            f"there is no block {number}: the run's part {_PART} has {blocks:,}, from 0 to "
            f"{blocks - 1}"
        )
    shard = int(np.searchsorted(starts, number, side="right")) - 1
    return names[shard], number - int(starts[shard]), blocks


def _columns(
    folder: StageFolder, corpus: StageFolder, name: str, row: int, vocabulary: int
) -> dict[str, Any]:
    """One block's columns as a record batch has them."""
    shard = Shard(folder, name, source_store.layout_of(folder, vocabulary))
    of_corpus = Shard(corpus, name, corpus_store.BLOCKS)
    source_store.require_same_blocks(shard, of_corpus)
    n, _ = shard.place(row)
    blocks = of_corpus.columns(n)
    source_store.require_text(
        shard, n, shard.columns(n), blocks["block"], corpus_store.text_bytes(blocks)
    )
    return {
        name: Ragged(np.array([0, len(value)]), value)
        if isinstance(value, np.ndarray)
        else np.array([value])
        for name, value in shard.block(row).items()
    }


def _fused(folder: StageFolder, name: str, row: int, ids: np.ndarray) -> Fused:
    """One block's fused distributions, at the target's own tokens."""
    shard = Shard(folder, name, fused_store.layout_of(folder))
    columns = shard.block(row)
    if not np.array_equal(columns["ids"], ids):
        raise shard.damaged(f"block {columns['block']} has other tokens than the target's")
    return Fused.of(columns)


def _sources(gathered: _Gathered, rules: FusionRules, size: int) -> tuple[SourceView, ...]:
    """Each source's part in a block of `size` bytes."""
    target, readings = gathered.read[TARGET], list(gathered.readings.values())
    positions, whole = len(target.predicting), np.array([0, size])
    by_byte = np.array([reading.nats_by_byte(whole) for reading in readings])
    read = np.array([[len(reading.tokens.ids) > 0] for reading in readings])
    aligned = np.array([reading.aligned.source >= 0 for reading in readings])
    block = np.zeros(positions, dtype=np.int64)
    compared = compare(target, whole, readings, rules, by_byte, read, block, aligned)
    scored_bits = np.isfinite(by_byte).sum(1) * NATS_PER_BIT
    weights = _weights(gathered.fused, len(readings))
    return tuple(
        SourceView(
            name,
            gathered.model_tokens(name),
            tuple(reading.aligned.source.tolist()),
            tuple(Situation(n).name.lower() for n in reading.aligned.situations.tolist()),
            tuple(weights[s].tolist()),
            tuple(compared.cross_entropy[s].tolist()),
            float(np.nansum(by_byte[s]) / scored_bits[s]) if scored_bits[s] else None,
            s in rules.referees,
        )
        for s, (name, reading) in enumerate(gathered.readings.items())
    )


def _weights(fused: Fused, sources: int) -> np.ndarray:
    """[S, N] each source's share of the stored fused distributions."""
    weights = np.zeros((sources, len(fused.parts)))
    mass = (
        np.bincount(fused.part_of_outcome, weights=fused.masses, minlength=len(fused.lengths))
        + fused.rest
    )
    weights[fused.source, fused.position_of_part] = mass
    return weights


def _winners(sources: Sequence[SourceView], positions: int) -> tuple[str | None, ...]:
    most = [max(sources, key=lambda source: source.weights[n]) for n in range(positions)]
    return tuple(s.name if s.weights[n] > 0 else None for n, s in enumerate(most))


def _instructive(
    gathered: _Gathered, sources: Sequence[SourceView], winners: Sequence[str | None]
) -> int | None:
    named = {source.name: source for source in sources}
    has_true = _has_true(gathered)

    def worth(n: int) -> tuple[bool, bool, int]:
        otherwise = named[winners[n] or ""].situations[n] not in ("same", "unaligned")
        aligned = sum(source.positions[n] >= 0 for source in sources)
        return otherwise, bool(has_true[n]), aligned

    won = [n for n, winner in enumerate(winners) if winner is not None]
    return max(won, key=worth) if won else (0 if winners else None)


def _has_true(gathered: _Gathered) -> np.ndarray:
    """[N] whether the true next token is in an outcome of the fused distribution."""
    fused, target = gathered.fused, gathered.read[TARGET]
    true_ids = target.ids[target.predicting + 1]
    source = fused.source[fused.part_of_outcome]
    position = fused.position_of_part[fused.part_of_outcome]
    has_true = np.zeros(len(fused.parts), dtype=bool)
    for s, sets in enumerate(gathered.sets.values()):
        own = np.nonzero(source == s)[0]
        has = sets.contain(fused.outcomes[own], true_ids[position[own]])
        has_true[position[own[has]]] = True
    return has_true


def _before(gathered: _Gathered, rules: FusionRules, name: str, position: int) -> Before | None:
    reading, target = gathered.readings[name], gathered.read[TARGET]
    place = int(reading.aligned.source[position])
    if place < 0:
        return None
    translation, given, ends = reading.translation, reading.distributions, reading.tokens.ends
    block = np.zeros(len(reading.aligned.source), dtype=np.int64)
    carried = carry_to(target, reading, rules, block, np.array([position]))
    rows = slice(given.offsets[place], given.offsets[place + 1])
    ids, masses = given.ids[rows], given.masses[rows]
    becomes, spelled = translation.outcome_of_source[ids], gathered.spelled(name, ids)
    kept = tuple(
        Entry(int(ids[n]), spelled[n], float(masses[n]), _number(becomes[n]))
        for n in np.lexsort((ids, -masses))
    )
    true_id, until = gathered.true_id(position), target.ends[position + 1]
    last = next((j for j in range(place + 1, len(ends)) if ends[j] >= until), len(ends) - 1)
    return Before(
        place,
        gathered.spelled(name, reading.tokens.ids[place + 1 : last + 1]),
        kept,
        reading.healed,
        float(given.tail[place]),
        _outcomes(gathered, name, reading.sets, carried.outcomes, carried.masses, true_id),
        max(float(carried.rest[0] - given.tail[place]), 0.0),
        _number(_outcome_of(translation, true_id)),
        name,
    )


def _shares(gathered: _Gathered, sources: Sequence[SourceView], position: int) -> tuple[Share, ...]:
    fused, names = gathered.fused, list(gathered.readings)
    parts, starts = fused.part_offsets, fused.outcome_offsets
    true_id, shares = gathered.true_id(position), []
    for part in range(parts[position], parts[position + 1]):
        rows, s = slice(starts[part], starts[part + 1]), int(fused.source[part])
        name, numbers, masses = names[s], fused.outcomes[rows], fused.masses[rows]
        outcomes = _outcomes(gathered, name, gathered.sets[name], numbers, masses, true_id)
        weight, rest = sources[s].weights[position], float(fused.rest[part])
        shares.append(Share(name, weight, outcomes, rest))
    return tuple(shares)


def _outcome_of(translation: VocabularyMap, target_ids: np.ndarray | int) -> np.ndarray:
    """The outcomes of target tokens; -1 for none."""
    outcomes = translation.outcome_of_target[target_ids]
    # Tokens that no outcome takes are together one, where outcomes are complete.
    leftover = translation.outcomes if translation.complete else -1
    return np.where(outcomes < 0, leftover, outcomes)


def _number(outcome: np.ndarray) -> int | None:
    return None if outcome < 0 else int(outcome)


def _outcomes(
    gathered: _Gathered,
    name: str,
    sets: OutcomeSets,
    numbers: np.ndarray,
    masses: np.ndarray,
    true_id: int,
) -> tuple[OutcomeView, ...]:
    def outcome(number: int, mass: float) -> OutcomeView:
        ids = sets[number]
        shortest_first = sorted(
            gathered.spelled(TARGET, ids), key=lambda token: (len(token), token)
        )
        leftover = number == gathered.readings[name].translation.outcomes
        return OutcomeView(number, tuple(shortest_first), mass, true_id in ids, leftover)

    return tuple(outcome(int(numbers[n]), float(masses[n])) for n in np.lexsort((numbers, -masses)))
