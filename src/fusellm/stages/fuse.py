"""fuse: align, translate and fuse; array work over shards, no model, no GPU.

Nothing aligned but unfused is ever written.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.align.positions import Situation
from fusellm.align.ragged import offsets_of
from fusellm.align.translation import TRANSLATIONS, Translation, same_tokenizer
from fusellm.config import Recipe
from fusellm.fusion.functions import FUNCTIONS
from fusellm.fusion.fuse import BlockCounts, FusedBlock, Reading, fuse_block
from fusellm.fusion.kept import Kept
from fusellm.progress import Progress
from fusellm.store.blocks import Block, open_corpus, read_shard
from fusellm.store.externalized import TARGET, open_externalized
from fusellm.store.fused import FUSED_SCHEMA, fused_folder, write_members
from fusellm.store.manifest import Identity, StageFolder, StageWriter
from fusellm.store.tables import Shard, shard_names, write_table
from fusellm.tokens.encode import Encoder

COUNTS = "counts.json"


def identity(recipe: Recipe, externalized: dict[str, str]) -> Identity:
    """What the fused distributions are made from.

    Args:
        externalized: fingerprints of the folders under externalize/, the target's too.
    """
    fusion = recipe.fusion.model_dump(exclude={"lambda_", "rest"})  # these are read by train
    order = [source.name for source in recipe.sources]
    return Identity("fuse", {"fusion": fusion, "sources": order}, externalized)


def run_fuse(
    recipe: Recipe,
    run: Path,
    identity_: Identity,
    encoders: dict[str, Encoder],
    progress: Progress,
) -> None:
    """Write the fused distributions of a run.

    Args:
        encoders: of the sources by name, and of the target as "target".
    """
    corpus, target = open_corpus(run), open_externalized(run, TARGET)
    sources = {source.name: open_externalized(run, source.name) for source in recipe.sources}
    with StageWriter.open(fused_folder(run), identity_) as folder:
        if folder.complete:
            return
        translations = _translations(recipe, folder, encoders, progress)
        from_start = {
            name: same_tokenizer(encoders[name], encoders[TARGET])
            or not (encoders[name].vocabulary.space_mark or encoders[TARGET].vocabulary.space_mark)
            for name in sources
        }
        names = shard_names(corpus, "train-")
        with progress.start("fusing", len(names), "shards") as bar:
            for name in names:
                if name not in folder.shards:
                    blocks = read_shard(corpus, name)
                    tokens = Shard(target, name)
                    readings = {s: Shard(source, name) for s, source in sources.items()}
                    rows, tally = [], _Tally(list(sources))
                    for n, block in enumerate(blocks):
                        ids, fused = _fuse(
                            recipe, n, block, tokens, readings, translations, from_start, tally
                        )
                        rows.append((ids, fused))
                    write_table(
                        folder, name, _columns(blocks, rows), FUSED_SCHEMA, tally.as_counts()
                    )
                bar.advance()
        summary = _summary(folder, list(sources))
        folder.write_text(COUNTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        folder.finish({"blocks": sum(d["blocks"] for d in summary["domains"].values())})


def _translations(
    recipe: Recipe, folder: StageWriter, encoders: dict[str, Encoder], progress: Progress
) -> dict[str, Translation]:
    translations = {}
    with progress.start("mapping vocabularies", len(recipe.sources), "sources") as bar:
        for source in recipe.sources:
            made = TRANSLATIONS[recipe.fusion.strategy](encoders[source.name], encoders[TARGET])
            translations[source.name] = made
            write_members(folder, source.name, *made.members())
            bar.advance()
    return translations


def _fuse(
    recipe: Recipe,
    row: int,
    block: Block,
    tokens: Shard,
    readings: dict[str, Shard],
    translations: dict[str, Translation],
    from_start: dict[str, bool],
    tally: "_Tally",
) -> tuple[np.ndarray, FusedBlock]:
    target = tokens.block(row)
    sources: list[Reading | None] = []
    for name, shard in readings.items():
        reading = shard.block(row)
        usable = reading["read"] and target["read"] and len(reading["ids"]) > 1
        sources.append(
            Reading(
                reading["ends"].astype(np.int64),
                _kept(reading),
                translations[name],
                from_start[name],
            )
            if usable
            else None
        )
        if not reading["read"]:
            tally.left_out(block, name)
    ends = (
        target["ends"].astype(np.int64)
        if target["read"]
        else np.zeros(len(target["ids"]), np.int64)
    )
    window = recipe.fusion.window_bytes if recipe.fusion.granularity == "window" else None
    function = FUNCTIONS[recipe.fusion.function]
    fused, counts = fuse_block(ends, len(block.text.encode()), sources, function, window)
    tally.add(block, fused, counts)
    return target["ids"], fused


def _kept(reading: dict[str, Any]) -> Kept:
    return Kept(
        offsets_of(reading["kept"]),
        reading["kept_ids"].astype(np.int64),
        reading["log_probs"].astype(np.float32),
        reading["counts"],
        reading["tail"],
        reading["true_log_prob"],
    )


def _columns(
    blocks: Sequence[Block], rows: Sequence[tuple[np.ndarray, FusedBlock]]
) -> dict[str, list[Any]]:
    return {
        "block": [block.number for block in blocks],
        "ids": [ids for ids, _ in rows],
        "winner": [fused.winner for _, fused in rows],
        "lengths": [fused.lengths for _, fused in rows],
        "outcomes": [fused.outcomes for _, fused in rows],
        "masses": [fused.masses for _, fused in rows],
        "rest": [fused.rest for _, fused in rows],
    }


class _Tally:
    """Counts of one shard, per domain and source, in a form that can be added up."""

    def __init__(self, sources: list[str]) -> None:
        self._sources = sources
        self._domains: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._examples: dict[str, str] = {}

    def left_out(self, block: Block, source: str) -> None:
        self._domains[block.domain][f"{source}/blocks_left_out"] += 1
        self._examples.setdefault(f"{block.domain}/{source}", block.text[:200])

    def add(self, block: Block, fused: FusedBlock, counts: Sequence[BlockCounts | None]) -> None:
        sums = self._domains[block.domain]
        sums["blocks"] += 1
        sums["positions"] += len(fused.winner)
        sums["without_source"] += int((fused.winner < 0).sum())
        for s, name in enumerate(self._sources):
            sums[f"{name}/wins"] += int((fused.winner == s).sum())
            found = counts[s]
            if found is None:
                continue
            for situation in Situation:
                sums[f"{name}/{situation.name.lower()}"] += int(found.situations[situation])
            sums[f"{name}/mass_kept"] += found.mass_kept
            sums[f"{name}/mass_carried"] += found.mass_carried
            sums[f"{name}/nats"] += found.nats
            sums[f"{name}/scored_bytes"] += found.scored_bytes
            sums[f"{name}/first_positions"] += found.first_positions

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
        for domain, found in counts.get("domains", {}).items():
            for key, value in found.items():
                sums[domain][key] += value
        examples = counts.get("examples", {}) | examples
    return {
        "domains": {d: _domain_summary(d, found, sources, examples) for d, found in sums.items()}
    }


def _domain_summary(
    domain: str, sums: dict[str, float], sources: list[str], examples: dict[str, str]
) -> dict[str, Any]:
    def of_source(name: str) -> dict[str, Any]:
        situations = {s.name.lower(): int(sums[f"{name}/{s.name.lower()}"]) for s in Situation}
        aligned = sum(situations.values()) - situations["unaligned"]
        scored_bits = sums[f"{name}/scored_bytes"] * np.log(2)
        return {
            "situations": situations,
            "first_positions": int(sums[f"{name}/first_positions"]),
            "mass_kept": sums[f"{name}/mass_kept"] / max(aligned, 1),
            "mass_carried": sums[f"{name}/mass_carried"] / max(aligned, 1),
            "bits_per_byte": sums[f"{name}/nats"] / scored_bits if scored_bits else None,
            "blocks_left_out": int(sums[f"{name}/blocks_left_out"]),
            "example_left_out": examples.get(f"{domain}/{name}"),
        }

    return {
        "blocks": int(sums["blocks"]),
        "positions": int(sums["positions"]),
        "without_source": int(sums["without_source"]),
        "wins": {name: int(sums[f"{name}/wins"]) for name in sources},
        "sources": {name: of_source(name) for name in sources},
    }
