"""Each source beside the target, on the text that was tried."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusellm.evaluation.compare.statistics import Estimate
from fusellm.evaluation.text.intervals import estimates_of
from fusellm.explain.tokenizers import compare_tokenizers
from fusellm.models.readers import Reader
from fusellm.stages.evaluate import over_common_bytes, read_nats, twin
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.externalized import TARGET
from fusellm.store.manifest import StageFolder
from fusellm.store.planned import PlannedPair

_COMPARED_BYTES = 60_000  # of each domain, for what tokenizers make of each other
_RESAMPLINGS = 1000


def pairs_of(
    run: Path, readers: Mapping[str, Reader], referees: Sequence[str]
) -> dict[str, PlannedPair]:
    """What was seen of each source in a run.

    Args:
        run: whose text is cut; what of it was evaluated is looked at.
        readers: its models by name, the target's as "target".
        referees: sources that are compared and never taught.
    """
    blocks = read_part(open_corpus(run), "held_out")
    nats = _nats(run, readers, blocks)
    texts = _texts(read_part(open_corpus(run), "train"))
    differences = [(TARGET, name) for name in readers if name != TARGET and name in nats]
    by_task: dict[str, dict[str, Estimate]] = {}
    if differences and TARGET in nats:
        scores = over_common_bytes(blocks, nats)
        by_task, _ = estimates_of(scores, _RESAMPLINGS, 0, differences)
    pairs = {}
    for name, reader in readers.items():
        if name == TARGET:
            continue
        compared = compare_tokenizers(reader.encoder, readers[TARGET].encoder, texts)
        situations = {
            domain.name: {
                case: count / max(domain.positions, 1) for case, count in domain.situations.items()
            }
            for domain in compared.domains
        }
        estimates = {
            domain: by_task[domain][f"{TARGET}-{name}"]
            for domain in dict.fromkeys(block.domain for block in blocks)
            if domain in by_task and (TARGET, name) in differences
        }
        pairs[name] = PlannedPair(
            situations,
            {domain: float(one.value) for domain, one in estimates.items()},
            {domain: one.interval for domain, one in estimates.items()},
            compared.verdict(name, "the target"),
            name in referees,
        )
    return pairs


def _nats(
    run: Path, readers: Mapping[str, Reader], blocks: Sequence[Block]
) -> dict[str, list[np.ndarray]]:
    """What held-out text cost each model; of two that are one, the first was measured."""
    folder = run / "evaluate"
    if not folder.exists():
        return {}
    stage, measured, nats = StageFolder(folder), dict[str, str](), dict[str, list[np.ndarray]]()
    shards = {name: f"{name}.arrow" for name in readers}
    for name, reader in readers.items():
        if shards[name] in stage.shards:
            measured[twin(reader.located, reader.encoder)] = shards[name]
    for name, reader in readers.items():
        shard = measured.get(twin(reader.located, reader.encoder))
        if shard is not None:
            nats[name] = read_nats(stage, shard, blocks)
    return nats


def _texts(blocks: Sequence[Block]) -> dict[str, list[str]]:
    """Some text of each domain."""
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for block in blocks:
        if sizes.get(block.domain, 0) < _COMPARED_BYTES:
            texts.setdefault(block.domain, []).append(block.text)
            sizes[block.domain] = sizes.get(block.domain, 0) + len(block.text.encode())
    return texts
