"""One block of a run as data: what each model read, and what became of it at each position.

This is what `fusellm inspect` and `fusellm view` show. Nothing is computed here that fusion does
not compute, nothing is written, and no model is loaded: tokenizers only.

T tokens of one model's reading; N target positions that predict; S sources, in the recipe's order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
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
from fusellm.explain.views import (
    Before,
    BlockView,
    Entry,
    ModelTokens,
    OutcomeView,
    PositionView,
    Share,
    SourceView,
)
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.fusion.fuse import FusionRules, Reading, carry_to, compare, rules_of
from fusellm.fusion.pairing import Pairing
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.stages.fuse import pairings_of
from fusellm.store import blocks as corpus_store
from fusellm.store import externalized as source_store
from fusellm.store import fused as fused_store
from fusellm.store.externalized import TARGET
from fusellm.store.layout import Layout
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.tokens.encode import Encoder

_PART = "train"  # that sources read; validation and held_out are kept from them
_OPEN_SHARDS, _KEPT_BLOCKS = 3, 8
_CACHED = 1  # record batches of a shard; one of long blocks and many draws is large
_SETTINGS = (
    *("strategy", "compatibility", "token_healing", "inside_tokens", "function"),
    *("granularity", "window_bytes", "hindsight", "cross_entropy"),
)


def require_fused(run: Path) -> None:
    """Raise StoreError where there is nothing to look at yet."""
    if not (fused_store.fused_folder(run) / MANIFEST).exists():
        raise StoreError(f"{run} has no fused distributions yet; first: fusellm fuse {run}")


def inspect_block(
    recipe: Recipe,
    run: Path,
    readers: Mapping[str, Reader],
    number: int,
    position: int | None,
    progress: Progress,
    answer: int | None = None,
) -> BlockView:
    """One block of the part that sources read; see `BlockInspector`."""
    return BlockInspector(recipe, run, readers, progress).block(number, position, answer)


class BlockInspector:
    """A fused run whose blocks are looked at, one after another.

    What all blocks have in common is read once: the vocabulary maps, the outcomes, what frames the
    shards. The blocks looked at last are kept, so that another position of one costs little.

    Attributes:
        blocks: how many there are.
        readers: the sources by name, and the target as "target".
    """

    def __init__(
        self, recipe: Recipe, run: Path, readers: Mapping[str, Reader], progress: Progress
    ) -> None:
        """Open a run; no model is loaded.

        Args:
            readers: the sources by name, and the target as "target".

        Raises:
            StoreError: a stage is not finished, or a tokenizer is not the one that it was.
        """
        require_fused(run)
        self._recipe, self.readers = recipe, readers
        fused, corpus = fused_store.open_fused(run), corpus_store.open_corpus(run)
        self._encoders: dict[str, Encoder] = {n: reader.encoder for n, reader in readers.items()}
        folders = _folders(recipe, run, readers)
        self._names = shard_names(corpus, f"{_PART}-")
        counts = [corpus.shards[name]["counts"]["blocks"] for name in self._names]
        self._starts = offsets_of(np.array(counts, dtype=np.int64))
        self.blocks = int(self._starts[-1])
        self._progress, self._fused = progress, fused
        layouts = {
            name: source_store.layout_of(folder, len(self._encoders[name].vocabulary))
            for name, folder in folders.items()
        }
        open_shards = partial(
            _Shards.open, corpus, fused, fused_store.layout_of(fused), folders, layouts
        )
        self._shards = lru_cache(maxsize=_OPEN_SHARDS)(open_shards)
        self._looked: dict[tuple[int, int | None], _LookedAt] = {}

    def prepare(self) -> None:
        """Read what all blocks have in common now, and not with the first of them."""
        _ = self._common

    @cached_property
    def _common(self) -> tuple[dict[str, Pairing], dict[str, OutcomeSets]]:
        pairings = pairings_of(self._recipe, self.readers, self._progress)
        vocabulary = len(self._encoders[TARGET].vocabulary)
        sets = {n: fused_store.read_sets(self._fused, n, vocabulary) for n in pairings}
        return pairings, sets

    def block(
        self, number: int, position: int | None = None, answer: int | None = None
    ) -> BlockView:
        """One block, and one of its positions closely.

        Args:
            number: of the block, from 0.
            position: from 0 to N - 1; None takes an instructive one with a fused distribution:
                where the winner cuts what follows otherwise, then where the true next token is
                among its outcomes, then where most sources are aligned; the first of these.
            answer: of a conversation, which of its answers, from 0; the first if None.

        Raises:
            StoreError: there is no such block, answer or position, or it is damaged.
        """
        looked = self._look(number, answer, position)
        if position is None:
            view = looked.view
            position = _instructive(looked.gathered, view.sources, view.winners)
        if position is None:
            return looked.view
        return replace(looked.view, at=self.position(number, position, answer))

    def position(self, number: int, position: int, answer: int | None = None) -> PositionView:
        """One position of a block; arguments and errors as those of `block`."""
        looked = self._look(number, answer, position)
        gathered, view = looked.gathered, looked.view
        rules, target = _rules(self._recipe), view.target
        before = tuple(_before(gathered, rules, name, position) for name in gathered.readings)
        after = (target.ends[position], target.spelled[position + 1])
        return PositionView(position, *after, before, _shares(gathered, view.sources, position))

    def read_by_target(self, number: int, answer: int | None = None) -> tuple[np.ndarray, int]:
        """What the target reads of a block, and where what is shown of it begins.

        Returns:
            ([T] ids of the whole block, its template's included; the position among them, of all
            but the last, that is number 0 of the view)
        """
        looked = self._look(number, answer)
        return looked.ids, looked.first

    def fused(self, number: int, answer: int | None = None) -> tuple[Fused, list[OutcomeSets]]:
        """A block's fused distributions, and the outcomes of the sources in their order."""
        gathered = self._look(number, answer).gathered
        return gathered.fused, list(gathered.sets.values())

    def _look(self, number: int, answer: int | None, position: int | None = None) -> "_LookedAt":
        looked = self._looked.pop((number, answer), None)
        if looked is not None:
            _require_position(number, position, looked.view.positions)
        else:
            looked = self._gather(number, answer, position)
            if len(self._looked) >= _KEPT_BLOCKS:
                self._looked.pop(next(iter(self._looked)))
        self._looked[number, answer] = looked
        return looked

    def _gather(self, number: int, answer: int | None, position: int | None) -> "_LookedAt":
        if not 0 <= number < self.blocks:
            raise StoreError(
                f"there is no block {number}: the run's part {_PART} has {self.blocks:,}, from 0 "
                f"to {self.blocks - 1}"
            )
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[shard])
        shards, encoders = self._shards(self._names[shard]), self._encoders
        chosen = Looked.of(shards.block(row), answer)
        columns = {name: shards.columns(name, row) for name in encoders}
        read = {n: chosen.tokens(columns[n], encoders[n].prefix_tokens) for n in encoders}
        positions = len(read[TARGET].predicting)
        _require_position(number, position, positions)
        pairings, sets = self._common
        readings = {
            name: pairing.reading(read[TARGET], read[name], chosen.kept(columns[name]))
            for name, pairing in pairings.items()
        }
        stored = shards.fused(row, columns[TARGET]["ids"].values)
        stored = chosen.fused(stored, columns[TARGET], positions)
        gathered = _Gathered(read, encoders, readings, stored, sets)
        view = _view(self._recipe, number, self.blocks, chosen.block, gathered)
        if chosen.number is not None:
            said = chosen.asked(columns[TARGET], encoders[TARGET])
            view = replace(view, answer=chosen.number, answers=chosen.answers, asked=said)
        ids = columns[TARGET]["ids"].values
        return _LookedAt(gathered, view, ids, chosen.first_position(columns[TARGET]))


def _require_position(number: int, position: int | None, positions: int) -> None:
    if position is not None and not 0 <= position < positions:
        numbers = f", from 0 to {positions - 1}" if positions else ""
        raise StoreError(
            f"there is no position {position}: block {number} has {positions:,}{numbers}"
        )


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
class _Shards:
    """One shard of the corpus, and the same blocks in all other stores of a run."""

    corpus: Shard
    of_fused: Shard
    models: Mapping[str, Shard]
    checked: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        corpus: StageFolder,
        fused: StageFolder,
        layout: Layout,
        folders: Mapping[str, StageFolder],
        layouts: Mapping[str, Layout],
        name: str,
    ) -> "_Shards":
        """Those of a name.

        Raises:
            StoreError: one is damaged, or has other blocks.
        """
        of_corpus = Shard(corpus, name, corpus_store.BLOCKS, _CACHED)
        models = {n: Shard(folder, name, layouts[n], _CACHED) for n, folder in folders.items()}
        for shard in models.values():
            source_store.require_same_blocks(shard, of_corpus)
        return cls(of_corpus, Shard(fused, name, layout, _CACHED), models)

    def block(self, row: int) -> corpus_store.Block:
        return corpus_store.block_of(self.corpus.block(row))

    def columns(self, name: str, row: int) -> dict[str, Any]:
        """A block's columns of a model's store, as a record batch has them."""
        shard, (n, _) = self.models[name], self.corpus.place(row)
        if (name, n) not in self.checked:
            blocks = self.corpus.columns(n)
            lengths = corpus_store.text_bytes(blocks)
            source_store.require_text(shard, n, shard.columns(n), blocks["block"], lengths)
            self.checked.add((name, n))
        return {
            column: Ragged(np.array([0, len(value)]), value)
            if isinstance(value, np.ndarray)
            else np.array([value])
            for column, value in shard.block(row).items()
        }

    def fused(self, row: int, ids: np.ndarray) -> Fused:
        """A block's fused distributions, at the target's own tokens."""
        columns = self.of_fused.block(row)
        if not np.array_equal(columns["ids"], ids):
            raise self.of_fused.damaged(
                f"block {columns['block']} has other tokens than the target's"
            )
        return Fused.of(columns)


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


@dataclass(frozen=True)
class _LookedAt:
    """A block that was looked at.

    Attributes:
        view: without a position.
        ids: [T] that the target reads of all of it.
        first: the position, among those of `ids`, that is number 0 of the view.
    """

    gathered: _Gathered
    view: BlockView
    ids: np.ndarray
    first: int


def _rules(recipe: Recipe) -> FusionRules:
    return rules_of(recipe.fusion, [source.referee for source in recipe.sources])


def _view(
    recipe: Recipe, number: int, blocks: int, block: corpus_store.Block, gathered: _Gathered
) -> BlockView:
    fusion, size = recipe.fusion, len(block.text.encode())
    sources = _sources(gathered, _rules(recipe), size)
    winners = _winners(sources, len(gathered.fused.parts))
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
        gathered.model_tokens(TARGET),
        sources,
        winners,
        None,
    )


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
    weights[fused.source, fused.position_of_part] = fused.part_weights
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
