"""evaluate: every model of a run, by bits per byte of held-out text and by suites."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.config import EvaluationSettings, Recipe
from fusellm.errors import CorpusError
from fusellm.evaluation.compare.comparison import PAIRS, Rules
from fusellm.evaluation.compare.tables import compared_on
from fusellm.evaluation.measure import Prepared, candidate, measure_into, read_suites
from fusellm.evaluation.results import EvaluationResults
from fusellm.evaluation.text.intervals import Record, Scores, records
from fusellm.evaluation.text.nats import blocks_nats, without_context
from fusellm.models.load import Located, default_device, load_model
from fusellm.progress import Progress
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.files import from_json, require_inside
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import StageFolder
from fusellm.store.measured import NATS, NATS_SCHEMA
from fusellm.store.run_folder import SUITES
from fusellm.store.tables import Shard, write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoder

FOLDER = "evaluate"
RESULTS = "results.json"


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
                    "nats": [np.zeros(0) if row is None else row for row in nats],
                }
                write_table(folder, _shard(name), columns, NATS_SCHEMA)
        shards = {
            name: _shard(measured[_twin(located, encoder)])
            for name, (located, encoder) in models.items()
        }
        read = {name: _read(folder, shard, blocks) for name, shard in shards.items()}
        scores = _common(blocks, read)
        unread = {name: [len(row) == 0 for row in rows] for name, rows in read.items()}
        require_comparable(
            [block.domain for block in blocks],
            {name: [not changed for changed in rows] for name, rows in unread.items()},
        )
        _require_scored(scores)
        differences = [("fused", "clm")] if "clm" in models else []
        measured_bits = records(scores, recipe.evaluation.resamplings, recipe.seed, differences)
        notes = {
            "blocks": len(blocks),
            "blocks_left_out": sum(any(rows) for rows in zip(*unread.values(), strict=True)),
            "blocks_changed": {name: n for name, rows in unread.items() if (n := sum(rows))},
            "bytes": _bytes_by_domain(scores),
        }
        body = {"records": [record.as_dict() for record in measured_bits], "notes": notes}
        folder.write_text(RESULTS, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        folder.finish(notes)


def _twin(located: Located, encoder: Encoder) -> str:
    """Equal for models that must give equal results."""
    specials = encoder.vocabulary.prefix_ids, encoder.vocabulary.eos_id
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


def _read(folder: StageFolder, name: str, blocks: Sequence[Block]) -> list[np.ndarray]:
    """The nats of each block's bytes; none of one that the model could not read."""
    shard = Shard(folder, name, NATS)
    rows = [shard.block(n)["nats"].astype(np.float64) for n in range(len(shard))]
    sizes = [len(block.text.encode()) for block in blocks]
    if len(rows) != len(sizes) or any(
        len(nats) not in (0, size) for nats, size in zip(rows, sizes, strict=True)
    ):
        raise folder.damaged(name, "its blocks are not those of the corpus")
    return rows


def _common(blocks: Sequence[Block], nats: Mapping[str, Sequence[np.ndarray]]) -> Scores:
    """Sums per document over the bytes that every model scored."""
    number: dict[tuple[str, str], int] = {}
    for block in blocks:
        number.setdefault((block.domain, block.document), len(number))
    scored_bytes = np.zeros(len(number), dtype=np.int64)
    sums = {name: np.zeros(len(number)) for name in nats}
    for n, block in enumerate(blocks):
        arrays = {name: rows[n] for name, rows in nats.items()}
        if any(len(array) == 0 for array in arrays.values()):
            continue
        scored = np.isfinite(np.stack(list(arrays.values()))).all(axis=0)
        document = number[block.domain, block.document]
        scored_bytes[document] += int(scored.sum())
        for name, array in arrays.items():
            sums[name][document] += float(array[scored].sum())
    return Scores([domain for domain, _ in number], scored_bytes, sums)


def require_comparable(domains: Sequence[str], read: Mapping[str, Sequence[bool]]) -> None:
    """Check that of each domain there is a held-out block that all models can read.

    Args:
        domains: of each block.
        read: by model, whether its tokenizer leaves each block as it is.

    Raises:
        CorpusError: there is none.
    """
    for domain in dict.fromkeys(domains):
        own = {
            name: [can for can, of in zip(rows, domains, strict=True) if of == domain]
            for name, rows in read.items()
        }
        if not any(all(block) for block in zip(*own.values(), strict=True)):
            unread = [name for name, rows in own.items() if not any(rows)]
            raise CorpusError(
                f"no held-out block of domain {domain!r} can be read by all of {', '.join(read)}"
                + (f" ({', '.join(unread)} can read none at all)" if unread else "")
                + ": some tokenizer changes its text; leave that model or that domain out"
            )


def _require_scored(scores: Scores) -> None:
    for domain, scored_bytes in _bytes_by_domain(scores).items():
        if scored_bytes == 0:
            raise CorpusError(
                f"no byte of the held-out text of domain {domain!r} is predicted by all models: "
                "it is context, or every block is one token; check corpus.documents"
            )


def _bytes_by_domain(scores: Scores) -> dict[str, int]:
    domains = np.array(scores.domains)
    return {
        domain: int(scores.scored_bytes[domains == domain].sum())
        for domain in dict.fromkeys(scores.domains)
    }


def run_suites(
    run: Path,
    models: Mapping[str, Located],
    prepared: Sequence[Prepared],
    evaluation: EvaluationSettings,
    seed: int,
    progress: Progress,
    redo: bool = False,
) -> None:
    """Measure the models of a run, in the order of the table, and put the suites into its index.

    Raises:
        FusellmError: as `candidate` and `measure_into` do.
    """
    require_inside(run / SUITES, run)
    candidates = [candidate(name, located) for name, located in models.items()]
    measure_into(
        run / SUITES,
        candidates,
        prepared,
        Rules(PAIRS, evaluation.resamplings, seed, evaluation.pass_at),
        evaluation.published,
        progress,
        redo,
    )


def read_records(run: Path) -> list[Record]:
    """The results of a run.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    return [Record(**record) for record in _results(run)["records"]]


def read_results(
    run: Path, suites: Sequence[str] | None = None, bits_per_byte: bool = True
) -> EvaluationResults:
    """The results of a run: bits per byte, if asked for, and suites.

    Args:
        suites: only these; all that were measured if None.

    Raises:
        StoreError: they are missing, unfinished or damaged.
        EvaluationError: models cannot be compared, or the extra `eval` is not installed.
    """
    compared = tuple(read_suites(run / SUITES, suites))
    if not bits_per_byte:
        return EvaluationResults((), compared)
    said = compared_on(_results(run)["notes"])
    return EvaluationResults(tuple(read_records(run)), compared, said)


def _results(run: Path) -> dict[str, Any]:
    folder = StageFolder(run / FOLDER).require_complete(f"fusellm evaluate {run}")
    body: dict[str, Any] = from_json(folder.file(RESULTS).read_text(encoding="utf-8"))
    return body
