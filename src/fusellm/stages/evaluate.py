"""evaluate: held-out bits per byte of the sources, the target, the baseline and the fused model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.config import Recipe
from fusellm.errors import CorpusError
from fusellm.evaluation.bits_per_byte import blocks_nats, without_context
from fusellm.evaluation.intervals import Record, Scores, records
from fusellm.models.load import Located, default_device, load_model
from fusellm.progress import Progress
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoder

FOLDER = "evaluate"
RESULTS = "results.json"

_SCHEMA = pa.schema([("block", pa.int64()), ("nats", pa.list_(pa.float32()))])


def identity(recipe: Recipe, models: Mapping[str, str], corpus: str) -> Identity:
    """What the results are made from.

    Args:
        models: fingerprint of each model, in the order of the table.
    """
    settings = {
        "resamplings": recipe.evaluation.resamplings,
        "seed": recipe.seed,
        "models": list(models),
    }
    return Identity("evaluate", settings, dict(models) | {"corpus": corpus})


def run_evaluate(
    recipe: Recipe,
    run: Path,
    identity_: Identity,
    models: Mapping[str, tuple[Located, Encoder]],
    progress: Progress,
) -> None:
    """Measure every model, one in memory at a time, over the same bytes."""
    blocks = read_part(open_corpus(run), "held_out")
    with StageWriter.open(run / FOLDER, identity_) as folder:
        if folder.complete:
            return
        measured: dict[str, str] = {}
        for name, (located, encoder) in models.items():
            twin = measured.setdefault(_twin(located, encoder), name)
            if _shard(twin) not in folder.shards:
                nats = _measure(name, located, encoder, blocks, recipe, progress)
                columns: dict[str, list[Any]] = {
                    "block": [block.number for block in blocks],
                    "nats": [np.zeros(0) if found is None else found for found in nats],
                }
                write_table(folder, _shard(name), columns, _SCHEMA)
        shards = {
            name: _shard(measured[_twin(located, encoder)])
            for name, (located, encoder) in models.items()
        }
        read = {name: _read(folder, shard, len(blocks)) for name, shard in shards.items()}
        scores, left_out = _common(blocks, read)
        _require_scored(scores, read)
        differences = [("fused", "clm")] if "clm" in models else []
        found = records(scores, recipe.evaluation.resamplings, recipe.seed, differences)
        notes = {"blocks_left_out": left_out, "bytes": _bytes_by_domain(scores)}
        body = {"records": [record.as_dict() for record in found], "notes": notes}
        folder.write_text(RESULTS, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        folder.finish(notes)


def _twin(located: Located, encoder: Encoder) -> str:
    """Equal for models that must give equal results."""
    specials = encoder.vocabulary.bos_id, encoder.vocabulary.eos_id
    return digest([located.fingerprint, located.settings.precision, encoder.rules, *specials])


def _shard(name: str) -> str:
    return f"{name}.arrow"


def _measure(
    name: str,
    located: Located,
    encoder: Encoder,
    blocks: Sequence[Block],
    recipe: Recipe,
    progress: Progress,
) -> list[np.ndarray | None]:
    model = load_model(located, default_device())
    encoded = encoder.encode([block.text for block in blocks], [block.last for block in blocks])
    lengths = [len(block.text.encode()) for block in blocks]
    with progress.start(f"evaluating {name}", len(blocks), "blocks") as bar:
        nats = blocks_nats(model, encoded, lengths, recipe.evaluation.batch_tokens, bar.advance)
    return without_context(nats, [block.context for block in blocks])


def _read(folder: StageFolder, shard: str, blocks: int) -> list[np.ndarray]:
    table = Shard(folder, shard)
    return [table.block(n)["nats"].astype(np.float64) for n in range(blocks)]


def _common(
    blocks: Sequence[Block], nats: Mapping[str, Sequence[np.ndarray]]
) -> tuple[Scores, int]:
    """Sums per document over the bytes that every model scored."""
    number: dict[tuple[str, str], int] = {}
    for block in blocks:
        number.setdefault((block.domain, block.document), len(number))
    scored_bytes = np.zeros(len(number), dtype=np.int64)
    sums = {name: np.zeros(len(number)) for name in nats}
    left_out = 0
    for n, block in enumerate(blocks):
        arrays = {name: found[n] for name, found in nats.items()}
        if any(len(array) == 0 for array in arrays.values()):
            left_out += 1
            continue
        scored = np.isfinite(np.stack(list(arrays.values()))).all(axis=0)
        document = number[block.domain, block.document]
        scored_bytes[document] += int(scored.sum())
        for name, array in arrays.items():
            sums[name][document] += float(array[scored].sum())
    return Scores([domain for domain, _ in number], scored_bytes, sums), left_out


def _require_scored(scores: Scores, nats: Mapping[str, Sequence[np.ndarray]]) -> None:
    for domain, scored_bytes in _bytes_by_domain(scores).items():
        if scored_bytes == 0:
            unread = [n for n, found in nats.items() if all(len(array) == 0 for array in found)]
            raise CorpusError(
                f"no held-out block of domain {domain!r} can be read by all of {', '.join(nats)}"
                + (f" ({', '.join(unread)} can read none at all)" if unread else "")
                + ": some tokenizer changes its text; leave that model or that domain out"
            )


def _bytes_by_domain(scores: Scores) -> dict[str, int]:
    domains = np.array(scores.domains)
    return {
        domain: int(scores.scored_bytes[domains == domain].sum())
        for domain in dict.fromkeys(scores.domains)
    }


def read_records(run: Path) -> list[Record]:
    """The results of a run.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    folder = StageFolder(run / FOLDER).require_complete(f"fusellm evaluate {run}")
    body: dict[str, Any] = json.loads(folder.file(RESULTS).read_text(encoding="utf-8"))
    return [Record(**record) for record in body["records"]]
