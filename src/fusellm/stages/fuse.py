"""fuse: align, translate and fuse; array work over shards, no model, no GPU.

Nothing aligned but unfused is ever written. A shard is in memory at a time, and of what is read and
aligned a record batch of at most 64 blocks.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import STRATEGIES
from fusellm.alignment.written_on import SPLIT_RULE
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.arrays.spans import Spans
from fusellm.arrays.tokens import Tokens
from fusellm.config import Recipe
from fusellm.fusion.fuse import Counts, FusionRules, fuse_blocks, rules_of
from fusellm.fusion.pairing import Pairing, pair
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.stages.stage import FilledStage
from fusellm.store.blocks import BLOCKS, SPANS, open_corpus, text_bytes
from fusellm.store.externalized import (
    PREDICTED,
    TARGET,
    kept_of,
    layout_of,
    open_externalized,
    require_same_blocks,
    require_text,
    tokens_of,
)
from fusellm.store.fused import fused_schema, write_sets
from fusellm.store.identity import Identity
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names, write_table
from fusellm.store.translations import cached_translation
from fusellm.store.writer import StageWriter

COUNTS = "counts.json"


class FuseStage(FilledStage):
    """The folder `fuse`: fused distributions, and of each source its outcomes as sets of ids."""

    command = "fuse"

    def identity(self) -> Identity:
        """What the fused distributions are made from."""
        recipe = self.context.recipe
        fusion = recipe.fusion.model_dump() | {
            "token_healing": recipe.fusion.heals,
            "refine": recipe.fusion.refines,
            "refine_rule": SPLIT_RULE if recipe.fusion.refines else None,
        }
        order = [source.name for source in recipe.sources]
        inputs = {n: self.context.fingerprint(n) for n in self.after if n != "corpus"}
        referees = [source.name for source in recipe.sources if source.referee]
        settings = {"fusion": fusion, "sources": order, "referees": referees}
        return Identity("fuse", settings, inputs)

    def fill(self, folder: StageWriter) -> None:
        """Fuse the shards that are missing."""
        recipe, run, readers = self.context.recipe, self.context.run, self.context.readers
        corpus, target = open_corpus(run), open_externalized(run, TARGET)
        sources = {source.name: open_externalized(run, source.name) for source in recipe.sources}
        pairings = pairings_of(recipe, readers, self.context.progress)
        for name, pairing in pairings.items():
            write_sets(folder, name, pairing.sets)
        prefixes = {name: reader.encoder.prefix_tokens for name, reader in readers.items()}
        vocabularies = {name: len(reader.encoder.vocabulary) for name, reader in readers.items()}
        outcomes = max(len(pairing.sets) for pairing in pairings.values())
        schema = fused_schema(vocabularies[TARGET], outcomes)
        layouts = {
            name: layout_of(stage, vocabularies[name])
            for name, stage in {TARGET: target, **sources}.items()
        }
        names = shard_names(corpus, "train-")
        with self.context.progress.start("fusing", len(names), "shards") as bar:
            for name in names:
                if name not in folder.shards:
                    _fuse_shard(
                        name,
                        folder,
                        Shard(corpus, name, BLOCKS),
                        Shard(target, name, layouts[TARGET]),
                        {s: Shard(source, name, layouts[s]) for s, source in sources.items()},
                        pairings,
                        prefixes,
                        rules_of(recipe.fusion, [source.referee for source in recipe.sources]),
                        recipe.fusion.routes,
                        schema,
                    )
                bar.advance()
        summary = _summary(folder, list(sources))
        folder.write_text(COUNTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        folder.finish({"blocks": sum(d["blocks"] for d in summary["domains"].values())})


def pairings_of(
    recipe: Recipe, readers: Mapping[str, Reader], progress: Progress
) -> dict[str, Pairing]:
    """Each source beside the target, by the recipe's strategy.

    Args:
        readers: the models by name; the target is "target".
    """
    strategy, target = recipe.fusion.strategy, readers[TARGET]
    sizes = {s.name: len(readers[s.name].encoder.vocabulary) for s in recipe.sources}
    pairings = {}
    with progress.start("mapping vocabularies", sum(sizes.values()), "tokens") as bar:
        for name, size in sizes.items():
            source, done = readers[name], 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.advance(count)

            map_ = cached_translation(
                strategy,
                source.tokenizer_fingerprint,
                target.tokenizer_fingerprint,
                (size, len(target.encoder.vocabulary)),
                partial(STRATEGIES[strategy].translate, source.encoder, target.encoder, advance),
            )
            pairings[name] = pair(source.encoder, target.encoder, map_, recipe.fusion)
            bar.advance(size - done)
    return pairings


def _fuse_shard(
    name: str,
    folder: StageWriter,
    corpus: Shard,
    target: Shard,
    sources: Mapping[str, Shard],
    pairings: Mapping[str, Pairing],
    prefixes: Mapping[str, int],
    rules: FusionRules,
    routes: Mapping[str, str],
    schema: pa.Schema,
) -> None:
    numbers, ids, read, fused = (
        list[np.ndarray](),
        list[Ragged](),
        list[np.ndarray](),
        list[Fused](),
    )
    tally = _Tally(list(sources))
    shards = (target, *sources.values())
    for shard in shards:
        require_same_blocks(shard, corpus)
    batches = zip(corpus.batches(), *(shard.batches() for shard in shards), strict=True)
    for n, (blocks, of_target, *of_sources) in enumerate(batches):
        lengths = text_bytes(blocks)
        for shard, columns in zip(shards, (of_target, *of_sources), strict=True):
            require_text(shard, n, columns, blocks["block"], lengths)
        texts = _Texts.of(blocks)
        tokens = texts.tokens(of_target, prefixes[TARGET])
        readings = [
            pairings[source].reading(
                tokens, texts.tokens(columns, prefixes[source]), kept_of(columns)
            )
            for source, columns in zip(sources, of_sources, strict=True)
        ]
        routed = _routed(texts.domains, routes, list(sources))
        batch, together, each = fuse_blocks(tokens, texts.byte_offsets, readings, rules, routed)
        numbers.append(blocks["block"])
        ids.append(of_target["ids"])
        read.append(_with_a_distribution(of_target))
        fused.append(batch)
        tally.add(texts, together, each)
    write_table(folder, name, _columns(numbers, ids, read, fused), schema, tally.as_counts())


@dataclass(frozen=True)
class _Texts:
    """What is fused by itself: a block, or of a conversation each span that is learnt.

    Attributes:
        domains: of each.
        byte_offsets: where its bytes are, of all one after another.
        data: all of them.
        spans: of conversations.
    """

    domains: np.ndarray
    byte_offsets: np.ndarray
    data: bytes
    spans: Spans | None

    @classmethod
    def of(cls, blocks: Mapping[str, Any]) -> "_Texts":
        """Those of a record batch of the corpus."""
        data = "".join(blocks["text"]).encode()
        if SPANS not in blocks:
            return cls(blocks["domain"], offsets_of(text_bytes(blocks)), data, None)
        spans = Spans.of(blocks[SPANS])
        return cls(blocks["domain"][spans.block], spans.byte_offsets, data, spans)

    def tokens(self, columns: Mapping[str, Any], prefix_tokens: int) -> Tokens:
        """Their tokens, as a model reads them."""
        of_blocks = tokens_of(columns, prefix_tokens)
        if self.spans is None:
            return of_blocks
        return self.spans.tokens(of_blocks, columns[PREDICTED].values)

    def beginning(self, number: int) -> str:
        """Of a text, for people."""
        start, end = self.byte_offsets[number : number + 2]
        return self.data[start:end].decode()[:200]


def _with_a_distribution(columns: Mapping[str, Any]) -> np.ndarray:
    """[positions] bool, over all positions of the target, at which something was asked."""
    there = np.repeat(columns["read"].astype(np.bool_), np.maximum(columns["ids"].lengths - 1, 0))
    if PREDICTED in columns:
        predicted = columns[PREDICTED]
        starts = predicted.offsets[:-1][predicted.lengths > 0]
        there[there] = np.delete(predicted.values, starts)
    return there


def _routed(
    domains: np.ndarray, routes: Mapping[str, str], sources: list[str]
) -> np.ndarray | None:
    """[B] number of the source that each block goes to; None without routes."""
    if not routes:
        return None
    return np.array([sources.index(routes[domain]) for domain in domains])


def _columns(
    numbers: list[np.ndarray], ids: list[Ragged], read: list[np.ndarray], fused: list[Fused]
) -> dict[str, np.ndarray | Ragged]:
    """A shard's columns from its record batches.

    Args:
        numbers: of the blocks.
        ids: of the target, of all blocks.
        read: [positions] bool, where the target was asked. A block that it cannot read has
            positions all the same, without parts.
    """
    all_ids, all_fused = Ragged.concat(ids), Fused.concat(fused)
    positions = np.maximum(all_ids.lengths - 1, 0)
    there = np.concatenate(read)
    parts = np.zeros(len(there), dtype=np.uint8)
    parts[there] = all_fused.parts
    of_block = offsets_of(positions)
    part_offsets = offsets_of(parts)[of_block]
    outcome_offsets = all_fused.outcome_offsets[part_offsets]
    return {
        "block": np.concatenate(numbers),
        "ids": all_ids,
        "parts": Ragged(of_block, parts),
        "source": Ragged(part_offsets, all_fused.source),
        "lengths": Ragged(part_offsets, all_fused.lengths),
        "outcomes": Ragged(outcome_offsets, all_fused.outcomes),
        "masses": Ragged(outcome_offsets, all_fused.masses),
        "rest": Ragged(part_offsets, all_fused.rest),
    }


class _Tally:
    """Counts of one shard, per domain and source, in a form that can be added up."""

    def __init__(self, sources: list[str]) -> None:
        self._sources = sources
        self._domains: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._examples: dict[str, str] = {}

    def add(self, texts: _Texts, together: Counts, each: list[Counts]) -> None:
        """Add the counts of a record batch."""
        for domain in np.unique(texts.domains).tolist():
            own = texts.domains == domain
            sums = self._domains[domain]
            for name, values in together.items():
                sums[name] += float(values[own].sum())
            for source, counts in zip(self._sources, each, strict=True):
                for name, values in counts.items():
                    sums[f"{source}/{name}"] += float(values[own].sum())
                unread = np.nonzero(own & (counts["read"] == 0))[0]
                if len(unread):
                    example = texts.beginning(int(unread[0]))
                    self._examples.setdefault(f"{domain}/{source}", example)

    def as_counts(self) -> dict[str, Any]:
        return {
            "domains": {domain: dict(sums) for domain, sums in self._domains.items()},
            "examples": self._examples,
        }


def _summary(folder: StageFolder, sources: list[str]) -> dict[str, Any]:
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    examples: dict[str, str] = {}
    for name in shard_names(folder):
        counts = folder.shards[name]["counts"]
        for domain, of_domain in counts.get("domains", {}).items():
            for key, value in of_domain.items():
                sums[domain][key] += value
        examples = counts.get("examples", {}) | examples
    return {"domains": {d: _domain_summary(d, own, sources, examples) for d, own in sums.items()}}


def _domain_summary(
    domain: str, sums: dict[str, float], sources: list[str], examples: dict[str, str]
) -> dict[str, Any]:
    def of_source(name: str) -> dict[str, Any]:
        situations = {s.name.lower(): int(sums[f"{name}/{s.name.lower()}"]) for s in Situation}
        aligned = sums[f"{name}/aligned"]
        scored_bits = sums[f"{name}/scored_bytes"] * np.log(2)
        return {
            "situations": situations,
            "aligned": int(aligned),
            "first_positions": int(sums[f"{name}/first_positions"]),
            "ids_that_met": int(sums[f"{name}/met"]),
            "mass_kept": sums[f"{name}/mass_kept"] / max(aligned, 1),
            "mass_carried": sums[f"{name}/mass_carried"] / max(aligned, 1),
            "bits_per_byte": sums[f"{name}/nats"] / scored_bits if scored_bits else None,
            "blocks_left_out": int(sums["blocks"] - sums[f"{name}/read"]),
            "example_left_out": examples.get(f"{domain}/{name}"),
        }

    return {
        "blocks": int(sums["blocks"]),
        "positions": int(sums["positions"]),
        "without_source": int(sums["without_source"]),
        "ties": int(sums["ties"]),
        "wins": {name: sums[f"{name}/wins"] for name in sources},
        "sources": {name: of_source(name) for name in sources},
    }
