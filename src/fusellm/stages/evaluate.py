"""evaluate: every model of a run, by bits per byte of held-out text and by suites."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fusellm.errors import CorpusError, StoreError
from fusellm.evaluation.compare.comparison import PAIRS, Rules
from fusellm.evaluation.compare.tables import compared_on
from fusellm.evaluation.measure import PreparedSuite, candidate, measure_into, prepare, read_suites
from fusellm.evaluation.results import EvaluationResults
from fusellm.evaluation.text.continuations import CHOICE, Start, chosen_starts, continued
from fusellm.evaluation.text.intervals import Record, Scores, records
from fusellm.evaluation.text.nats import blocks_nats, without_context
from fusellm.models.load import Located, default_device, load_model, locate
from fusellm.models.readers import Reader
from fusellm.preflight import require_comparable
from fusellm.progress import Progress
from fusellm.stages.stage import Context, FilledStage, Stage
from fusellm.store.blocks import Block, encode_blocks, open_corpus, read_part
from fusellm.store.continuations import (
    ContinuedTexts,
    ModelTexts,
    continuations_of,
    write_continuations,
)
from fusellm.store.externalized import TARGET
from fusellm.store.files import from_json, require_inside
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import StageFolder
from fusellm.store.measured import NATS, NATS_SCHEMA
from fusellm.store.run_folder import ASIDE, CLM, CONTINUATIONS, FUSED, SUITES, trained_folder
from fusellm.store.tables import Shard, write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoder

RESULTS = "results.json"


def evaluated_models(context: Context) -> dict[str, Reader]:
    """The models of the results table, in its order."""
    names = [source.name for source in context.recipe.sources]
    models = {name: context.readers[name] for name in (*names, TARGET)}
    for which in (CLM, FUSED) if context.recipe.training.clm_baseline else (FUSED,):
        models[which] = trained_model(context, which)
    return models


def trained_model(context: Context, which: str) -> Reader:
    """What a run has trained, FUSED or CLM."""
    return like_the_target(context, trained_folder(context.run, which))


def like_the_target(context: Context, folder: Path) -> Reader:
    """A model that was made from a run's target, in a folder with everything in it."""
    at = dict.fromkeys(("revision", "gguf_file", "tokenizer")) | {"model": str(folder)}
    located = locate(context.recipe.target.model_copy(update=at), context.trusted)
    return Reader(located, context.target.encoder, context.target.tokenizer_fingerprint)


class EvaluateStage(FilledStage):
    """Bits per byte of every model, one in memory at a time, over the same bytes."""

    command = "evaluate"

    def identity(self) -> Identity:
        """What the results are made from."""
        context, recipe = self.context, self.context.recipe
        models = {
            name: digest([model.located.fingerprint, model.located.settings.precision, *told])
            for name, model in evaluated_models(context).items()
            for told in [_tokenizer_told(model) if name in context.readers else []]
        }
        settings = {
            "resamplings": recipe.evaluation.resamplings,
            "seed": recipe.seed,
            "models": list(models),
        }
        return Identity("evaluate", settings, models | {"corpus": context.fingerprint("corpus")})

    def fill(self, folder: StageWriter) -> None:
        """Measure the models that are missing, and compare all."""
        recipe = self.context.recipe
        models = evaluated_models(self.context)
        blocks = read_part(open_corpus(self.context.run), "held_out")
        continued = _Continued(self.context, models)
        measured: dict[str, str] = {}
        for name, model in models.items():
            same = measured.setdefault(twin(model.located, model.encoder), name)
            if _shard(same) not in folder.shards:
                before = self._measured_before(name, folder.identity, blocks)
                batch_tokens, progress = recipe.evaluation.batch_tokens, self.context.progress
                also = partial(continued.ask, name)
                nats = before or measured_nats(name, model, blocks, batch_tokens, progress, also)[0]
                write_nats(folder, _shard(name), blocks, nats)
        shards = {
            name: _shard(measured[twin(model.located, model.encoder)])
            for name, model in models.items()
        }
        read = {name: read_nats(folder, shard, blocks) for name, shard in shards.items()}
        scores = over_common_bytes(blocks, read)
        unread = {name: [len(row) == 0 for row in rows] for name, rows in read.items()}
        require_comparable(
            [block.domain for block in blocks],
            {name: [not changed for changed in rows] for name, rows in unread.items()},
        )
        _require_scored(scores)
        differences = [(FUSED, CLM)] if CLM in models else []
        results = records(scores, recipe.evaluation.resamplings, recipe.seed, differences)
        notes = {
            "blocks": len(blocks),
            "blocks_left_out": sum(any(rows) for rows in zip(*unread.values(), strict=True)),
            "blocks_changed": {name: n for name, rows in unread.items() if (n := sum(rows))},
            "bytes": _bytes_by_domain(scores),
        }
        body = {"records": [record.as_dict() for record in results], "notes": notes}
        folder.write_text(RESULTS, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        folder.finish(notes)

    def _measured_before(
        self, name: str, identity: Identity, blocks: Sequence[Block]
    ) -> list[np.ndarray] | None:
        """What a model's blocks cost it in results that were set aside, if it is still the same.

        Where a training is made anew, its sources need not be asked again.
        """
        for path in sorted((self.context.run / ASIDE).glob("*/evaluate")):
            try:
                require_inside(path, self.context.run)
                former = StageFolder(path)
                had, has = former.identity.inputs, identity.inputs
                if all(had.get(key) == has[key] for key in ("corpus", name)):
                    return read_nats(former, _shard(name), blocks)
            except StoreError:  # what is damaged, or was not finished, is measured anew
                continue
        return None


def measured_nats(
    name: str,
    reader: Reader,
    blocks: Sequence[Block],
    batch_tokens: int | None,
    progress: Progress,
    also: Callable[[PreTrainedModel], object] = lambda model: None,
) -> tuple[list[np.ndarray], int]:
    """What a model's blocks cost it.

    Args:
        also: what is done with the model besides, while it is loaded.

    Returns:
        (the nats of each block's bytes, none of one that it could not read; its parameters)
    """
    model = load_model(reader.located, default_device())
    encoded = encode_blocks(reader.encoder, blocks)
    lengths = [len(block.text.encode()) for block in blocks]
    with progress.start(f"evaluating {name}", len(blocks), "blocks") as bar:
        nats = blocks_nats(model, encoded, lengths, batch_tokens, bar.advance)
    also(model)
    return scored_nats(nats, blocks), model.num_parameters()


def scored_nats(nats: Sequence[np.ndarray | None], blocks: Sequence[Block]) -> list[np.ndarray]:
    """Nats of each block's bytes without those of context; none of a block that was not read."""
    scored = without_context(nats, [block.context for block in blocks])
    return [np.zeros(0) if own is None else own for own in scored]


def write_nats(
    folder: StageWriter, name: str, blocks: Sequence[Block], nats: Sequence[np.ndarray]
) -> None:
    """Write what blocks cost a model."""
    columns: dict[str, Any] = {"block": [block.number for block in blocks], "nats": list(nats)}
    write_table(folder, name, columns, NATS_SCHEMA)


class ContinuationsStage(Stage):
    """What every model writes behind the same beginnings of held-out documents.

    Most is written while they are loaded to be measured. Each model's is known by what it was made
    from, so that there is no manifest.
    """

    command = "evaluate"

    def execute(self, redo: bool) -> None:
        """Ask the models that have not been asked; a run that is read-only is left as it is."""
        context = self.context
        if not os.access(context.run, os.W_OK):
            return
        if context.recipe.evaluation.continuations == 0:
            (context.run / CONTINUATIONS).unlink(missing_ok=True)
            return
        models = evaluated_models(context)
        continued = _Continued(context, models)
        for name, model in models.items():
            if not continued.has(name):
                continued.ask(name, load_model(model.located, default_device()))
        continued.keep_only(models)


class _Continued:
    """The continuations of a run, as far as they are there."""

    def __init__(self, context: Context, models: Mapping[str, Reader]) -> None:
        self._context, self._models = context, models
        self._count, seed = context.recipe.evaluation.continuations, context.recipe.seed
        self._made_from = digest([context.fingerprint("corpus"), seed, self._count, CHOICE])
        known = continuations_of(context.run)
        self._known = known if known and known.made_from == self._made_from else None

    @cached_property
    def _starts(self) -> list[Start]:
        blocks = read_part(open_corpus(self._context.run), "held_out")
        return chosen_starts(blocks, self._count, self._context.recipe.seed)

    def has(self, name: str) -> bool:
        """Whether a model has gone on with the beginnings, or an equal one, whose are then its."""
        if self._known is None:
            return False
        made_from = self._twin(name)
        for other, written in self._known.models.items():
            if written.made_from == made_from:
                if other != name:
                    self._keep(name, written)
                return True
        return False

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Have a loaded model go on with the beginnings, unless it has."""
        if self._count == 0 or self.has(name):
            return
        reader, progress = self._models[name], self._context.progress
        texts = continued(name, model, reader, self._starts, progress)
        self._keep(name, ModelTexts(self._twin(name), texts))

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the models that are none of these; the rest is in their order."""
        if self._known is not None and list(self._known.models) != list(names):
            kept = {name: self._known.models[name] for name in names}
            self._write(replace(self._known, models=kept))

    def _twin(self, name: str) -> str:
        return twin(self._models[name].located, self._models[name].encoder)

    def _keep(self, name: str, written: ModelTexts) -> None:
        known = self._known
        if known is None:
            known = ContinuedTexts(self._made_from, [start.beginning for start in self._starts])
        self._write(replace(known, models={**known.models, name: written}))

    def _write(self, known: ContinuedTexts) -> None:
        self._known = known
        write_continuations(self._context.run, known)


class SuitesStage(Stage):
    """What every model of a run answers to the documents of benchmarks.

    Its records know by themselves what they were made from, so that it has no manifest.
    """

    command = "evaluate"

    def find(self) -> list[PreparedSuite]:
        """Find the data, packages and sandbox of the suites, once.

        Raises:
            EvaluationError: something is missing.
        """
        return self._prepared

    @cached_property
    def _prepared(self) -> list[PreparedSuite]:
        wanted = [suite for suite in self.context.evaluation.suites if suite != "lm"]
        context = self.context
        return prepare(wanted, context.evaluation, context.progress) if wanted else []

    def require_readable(self) -> None:
        """Check that what it reads is finished, if there are suites."""
        if self.find():
            super().require_readable()

    def execute(self, redo: bool) -> None:
        """Measure the models, in the order of the table, and put the suites into the index.

        Raises:
            FusellmError: as `candidate` and `measure_into` do.
        """
        suites = self.find()
        if not suites:
            return
        context, evaluation = self.context, self.context.evaluation
        require_inside(self.folder, context.run)
        models = evaluated_models(context).items()
        measure_into(
            self.folder,
            [candidate(name, model.located, evaluation.chat) for name, model in models],
            suites,
            Rules(PAIRS, evaluation.resamplings, context.recipe.seed, evaluation.pass_at),
            evaluation.published,
            context.progress,
            redo,
        )


def _tokenizer_told(reader: Reader) -> list[str]:
    """Fingerprint of the tokenizer, where a recipe says which or what it puts before a text."""
    settings = reader.located.settings
    given = settings.tokenizer is not None or settings.prefix is not None
    given = given or bool(reader.encoder.said_around)
    return [reader.tokenizer_fingerprint] if given else []


def twin(located: Located, encoder: Encoder) -> str:
    """Equal for models that must give equal results."""
    specials = encoder.vocabulary.prefix_ids, encoder.vocabulary.eos_id, *encoder.said_around
    return digest([located.fingerprint, located.settings.precision, encoder.rules, *specials])


def _shard(name: str) -> str:
    return f"{name}.arrow"


def read_nats(folder: StageFolder, name: str, blocks: Sequence[Block]) -> list[np.ndarray]:
    """The nats of each block's bytes; none of one that the model could not read."""
    shard = Shard(folder, name, NATS)
    rows = [shard.block(n)["nats"].astype(np.float64) for n in range(len(shard))]
    sizes = [len(block.text.encode()) for block in blocks]
    if len(rows) != len(sizes) or any(
        len(nats) not in (0, size) for nats, size in zip(rows, sizes, strict=True)
    ):
        raise folder.damaged(name, "its blocks are not those of the corpus")
    return rows


def over_common_bytes(blocks: Sequence[Block], nats: Mapping[str, Sequence[np.ndarray]]) -> Scores:
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
    folder = StageFolder(run / "evaluate").require_complete(f"fusellm evaluate {run}")
    body: dict[str, Any] = from_json(folder.file(RESULTS).read_text(encoding="utf-8"))
    return body
