"""externalize: each source's next-token distributions over the corpus, once per source.

One shard of the corpus gives one shard here. The target is tokenized too, without distributions.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from fusellm.config import Recipe
from fusellm.errors import NumericsError, TokenizerError
from fusellm.models.load import describe
from fusellm.models.readers import Reader
from fusellm.preflight import require_fits
from fusellm.progress import Bar, Progress
from fusellm.reading.allocator import give_back
from fusellm.reading.background import Background
from fusellm.reading.engine import Engine, ModelLoaded, ReadingTask, ReadShard, Told
from fusellm.reading.local_engine import read_locally
from fusellm.reading.ray_engine import read_on_ray
from fusellm.reading.worker import (
    NOT_FINITE,
    WALK_FAILED,
    columns_of_tokens,
    token_counts,
)
from fusellm.stages.stage import Context, FilledStage
from fusellm.store.blocks import digest_of_blocks, encode_blocks, open_corpus, read_shard
from fusellm.store.externalized import TARGET, tokens_schema
from fusellm.store.identity import Identity
from fusellm.store.manifest import StageFolder
from fusellm.store.quantized import ERROR_NATS, STEP_NATS
from fusellm.store.tables import shard_names, write_encoded, write_table
from fusellm.store.writer import StageWriter

ENGINES: dict[str, Engine] = {"local": read_locally, "ray": read_on_ray}


class _ExternalizeStage(FilledStage):
    """A folder below `externalize`."""

    command = "externalize"

    def __init__(self, context: Context, model: str) -> None:
        """`model`: name of a source, or "target"."""
        super().__init__(context, f"externalize/{model}", ("corpus",))
        self.model, self.reader = model, context.readers[model]

    def prepare(self) -> None:
        """Check what the tokenizers make of the text, and that every block fits the model."""
        context = self.context
        context.try_text()
        require_fits(context.run, self.model, self.reader, context.recipe.corpus, context.progress)

    def tell_cut(self, counts: Mapping[str, int]) -> None:
        """Say how many conversations were not read to their end, if any.

        Args:
            counts: of the stage's shards, in all.
        """
        if counts.get("cut"):
            self.context.progress.say(
                f"{self.model}: {counts['cut']:,} of {counts['blocks']:,} conversations are longer "
                f"than its context of {self.reader.located.context_tokens:,} tokens, and are read "
                "as far as it goes"
            )


class TargetTokensStage(_ExternalizeStage):
    """The corpus as the target's tokenizer cuts it, without distributions."""

    def __init__(self, context: Context) -> None:
        """That of a run's target."""
        super().__init__(context, TARGET)

    def identity(self) -> Identity:
        """What the target's tokens are made from."""
        inputs = {
            "tokenizer": self.reader.tokenizer_fingerprint,
            "corpus": self.context.fingerprint("corpus"),
        }
        context = self.reader.located.context_tokens
        if context is not None and self.context.recipe.corpus.has_conversations:
            inputs["context"] = str(context)  # as far as which they are read
        return Identity(self.name, {}, inputs)

    def fill(self, folder: StageWriter) -> None:
        """Tokenize the corpus."""
        encoder, progress = self.reader.encoder, self.context.progress
        corpus = open_corpus(self.context.run)
        chat = self.context.recipe.corpus.has_conversations
        schema = tokens_schema(len(encoder.vocabulary), chat)
        folder.describe({"vocabulary": len(encoder.vocabulary)})
        names = shard_names(corpus, "train-")
        with progress.start("tokenizing for the target", len(names), "shards") as bar:
            for name in names:
                if name not in folder.shards:
                    blocks = read_shard(corpus, name)
                    encoded = encode_blocks(encoder, blocks)
                    counts = token_counts(encoded) | {"texts": digest_of_blocks(blocks)}
                    columns = columns_of_tokens(blocks, encoded)
                    write_table(folder, name, columns, schema, counts)
                bar.advance()
        sums = _sum_counts(folder)
        _tell_changed(progress, TARGET, sums.get("walk_failed", 0), sums.get("blocks", 0))
        self.tell_cut(sums)
        folder.finish(sums)


class SourceStage(_ExternalizeStage):
    """One source's next-token distributions over the corpus.

    A block with NaN or infinity is put aside with its reason. Whatever the engine, it is this
    process that writes. Finished shards are kept, whatever is raised:

    - ModelError: the model cannot be loaded.
    - NumericsError: more blocks than the recipe allows have NaN or infinity.
    - TokenizerError: its tokenizer changes more blocks than the recipe allows.
    - ClusterError: no cluster is there as asked, or its workers are lost again and again.
    """

    def identity(self) -> Identity:
        """What one source's distributions are made from."""
        recipe, located = self.context.recipe, self.reader.located
        sampled = recipe.externalize.scheme == "sampled"
        read = {"scheme", "draws"} if sampled else {"scheme", "k", "mass"}
        settings: dict[str, Any] = {
            "externalize": recipe.externalize.model_dump(include=read),
            "dtype": located.settings.precision,
        }
        if sampled:
            settings["seed"] = recipe.seed
        inputs = {
            "weights": located.fingerprint,
            "tokenizer": self.reader.tokenizer_fingerprint,
            "corpus": self.context.fingerprint("corpus"),
        }
        return Identity(self.name, settings, inputs)

    def fill(self, folder: StageWriter) -> None:
        """Read the shards that are missing."""
        corpus, progress = open_corpus(self.context.run), self.context.progress
        names = shard_names(corpus, "train-")
        left = [shard for shard in names if shard not in folder.shards]
        blocks_of = {shard: int(corpus.shards[shard]["counts"]["blocks"]) for shard in names}
        tally = _Aside(self.context.recipe, self.model, folder, sum(blocks_of.values()))
        tally.check()  # again, without a model: the recipe may allow more by now
        with progress.start(f"reading {self.model}", tally.blocks, "blocks") as bar:
            bar.advance(sum(blocks_of[shard] for shard in names if shard not in left))
            if left:
                self._read(folder, corpus, left, tally, bar)
        tally.check()
        _tell_changed(progress, self.model, len(tally.changed()), tally.blocks)
        sums = _sum_counts(folder)
        self.tell_cut(sums)
        folder.finish(sums)

    def _read(
        self,
        folder: StageWriter,
        corpus: StageFolder,
        left: Sequence[str],
        tally: "_Aside",
        bar: Bar,
    ) -> None:
        """Read shards by the engine; one is encoded and written while the next is read.

        An error of the thread that writes stops a model here at the latest after one batch more,
        and a cluster within a second.
        """
        context, engine = self.context, self.context.engine
        task = ReadingTask(context.recipe, self.reader.located, self.reader.encoder, corpus, left)

        def write(shard: ReadShard) -> None:
            done = shard.encode()
            write_encoded(folder, shard.name, done.shard, done.counts)
            tally.check()
            give_back()

        with (
            Background("fusellm-write") as writing,
            closing(ENGINES[engine.name](task, engine)) as events,
        ):
            for event in events:
                match event:
                    case int():
                        writing.check()
                        bar.advance(event)
                    case ReadShard():
                        writing.submit(partial(write, event))
                    case ModelLoaded():
                        # Where a device joins later, shards are being written: one thread alone
                        # writes the manifest.
                        about = _about(context.recipe, self.reader, event)
                        writing.submit(partial(folder.describe, about))
                    case Told():
                        context.progress.say(event.line)
                del event  # which may hold a whole shard while the next one is read


def _about(recipe: Recipe, reader: Reader, loaded: ModelLoaded) -> dict[str, Any]:
    """What whoever opens the folder without the recipe needs to know."""
    located = reader.located
    model = describe(located)
    del model["fingerprint"]
    around = reader.encoder.said_around[:2]
    return {
        "kind": "distributions",
        **model,
        "commit": located.commit,
        "weights_sha256": loaded.weights_sha256,
        "dtype": located.settings.precision,
        "vocabulary": len(reader.encoder.vocabulary),
        "externalize": recipe.externalize.model_dump(exclude={"batch_tokens"}),
        "step_nats": STEP_NATS,
        "error_nats": ERROR_NATS,
        "device": loaded.devices,
    } | ({"around": list(around)} if around else {})


def _tell_changed(progress: Progress, name: str, changed: int, blocks: int) -> None:
    if changed:
        progress.say(
            f"{name}: {changed:,} of {blocks:,} blocks are left out, because its tokenizer changes "
            "their text, or nothing that is learnt is within its context"
        )


class _Aside:
    """Blocks that a source could not read, over all its shards."""

    def __init__(self, recipe: Recipe, name: str, folder: StageFolder, blocks: int) -> None:
        self._recipe, self._name, self._folder, self.blocks = recipe, name, folder, blocks

    def not_finite(self) -> list[tuple[int, str]]:
        """(number, document) of the blocks in which the model gave NaN or infinity."""
        return [(number, document) for number, document, why in self._all() if why == NOT_FINITE]

    def changed(self) -> list[tuple[int, str]]:
        """(number, document) of the blocks whose text its tokenizer or its template changes."""
        return [(number, document) for number, document, why in self._all() if why != NOT_FINITE]

    def _all(self) -> list[list[Any]]:
        shards = self._folder.shards.values()
        return [one for shard in shards for one in shard["counts"].get("aside", [])]

    def check(self) -> None:
        """Raises NumericsError or TokenizerError where there are more than the recipe allows."""
        allowed = self._recipe.externalize
        not_finite, changed = self.not_finite(), self.changed()
        if len(not_finite) > allowed.not_finite_share * self.blocks:
            raise NumericsError(
                f"source {self._name!r} gives NaN or infinity on {self._too_many(not_finite)} "
                f"externalize.not_finite_share: {allowed.not_finite_share:g} allows. Try another "
                "dtype for it, or check its weights. Finished shards are kept; whatever reads them "
                "anew needs --redo"
            )
        if len(changed) > allowed.changed_share * self.blocks:
            reasons = {number: why for number, _, why in self._all()}
            why = reasons[min(changed)[0]]
            told = "" if why == WALK_FAILED else f" There {why}."
            raise TokenizerError(
                f"the tokenizer of source {self._name!r} changes {self._too_many(changed)} "
                f"externalize.changed_share: {allowed.changed_share:g} allows.{told} Take a model "
                "whose tokenizer keeps text as it is, or raise that share"
            )

    def _too_many(self, blocks: list[tuple[int, str]]) -> str:
        number, document = min(blocks)
        first = f"the first is block {number}, document {document!r}"
        return f"{len(blocks)} of {self.blocks} blocks ({first}), more than"


def _sum_counts(folder: StageFolder) -> dict[str, int]:
    rows = [shard["counts"] for shard in folder.shards.values()]
    keys = {key for row in rows for key, value in row.items() if isinstance(value, int)}
    return {key: sum(row.get(key, 0) for row in rows) for key in sorted(keys)}
