"""externalize: each source's next-token distributions over the corpus, once per source.

One shard of the corpus gives one shard here. The target is tokenized too, without distributions.
"""

from pathlib import Path
from typing import Any

from fusellm.config import Recipe
from fusellm.errors import NumericsError, TokenizerError
from fusellm.models.load import Located, describe
from fusellm.progress import Progress
from fusellm.stages.externalize.local import read_locally
from fusellm.stages.externalize.ray_cluster import require_ray
from fusellm.stages.externalize.ray_engine import read_on_ray
from fusellm.stages.externalize.task import Engine, EngineSettings, Task
from fusellm.stages.externalize.work import (
    NOT_FINITE,
    WALK_FAILED,
    Done,
    columns_of_tokens,
    encode_blocks,
    token_counts,
)
from fusellm.store.blocks import Block, digest_of_blocks, open_corpus, read_shard
from fusellm.store.externalized import TARGET, externalized_folder, tokens_schema
from fusellm.store.identity import Identity
from fusellm.store.manifest import StageFolder
from fusellm.store.quantized import ERROR_NATS, STEP_NATS
from fusellm.store.tables import shard_names, write_encoded, write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoder

ENGINES: dict[str, Engine] = {"local": read_locally, "ray": read_on_ray}


def require_engine(settings: EngineSettings) -> None:
    """Check that an engine can be had, as far as it can be told before it is needed.

    Raises:
        ClusterError: something is missing; the message has the command that installs it.
    """
    if settings.name == "ray":
        require_ray(settings)


def identity_of_source(
    recipe: Recipe, name: str, located: Located, tokenizer: str, corpus: str
) -> Identity:
    """What one source's distributions are made from.

    Args:
        tokenizer, corpus: fingerprints.
    """
    sampled = recipe.externalize.scheme == "sampled"
    read = {"scheme", "draws"} if sampled else {"scheme", "k", "mass"}
    settings: dict[str, Any] = {
        "externalize": recipe.externalize.model_dump(include=read),
        "dtype": located.settings.precision,
    }
    if sampled:
        settings["seed"] = recipe.seed
    inputs = {"weights": located.fingerprint, "tokenizer": tokenizer, "corpus": corpus}
    return Identity(f"externalize/{name}", settings, inputs)


def identity_of_target(tokenizer: str, corpus: str) -> Identity:
    """What the target's tokens are made from."""
    return Identity(f"externalize/{TARGET}", {}, {"tokenizer": tokenizer, "corpus": corpus})


def run_target(run: Path, identity: Identity, encoder: Encoder, progress: Progress) -> None:
    """Tokenize the corpus for the target."""
    corpus = open_corpus(run)
    schema = tokens_schema(len(encoder.vocabulary))
    with StageWriter.open(externalized_folder(run, TARGET), identity) as folder:
        if folder.complete:
            return
        folder.describe({"vocabulary": len(encoder.vocabulary)})
        names = shard_names(corpus, "train-")
        with progress.start("tokenizing for the target", len(names), "shards") as bar:
            for name in names:
                if name not in folder.shards:
                    blocks = read_shard(corpus, name)
                    encoded = encode_blocks(encoder, blocks)
                    counts = token_counts(encoded) | {"texts": digest_of_blocks(blocks)}
                    write_table(folder, name, columns_of_tokens(blocks, encoded), schema, counts)
                bar.advance()
        sums = _sum_counts(folder)
        _tell_changed(progress, TARGET, sums.get("walk_failed", 0), sums.get("blocks", 0))
        folder.finish(sums)


def run_source(
    recipe: Recipe,
    run: Path,
    name: str,
    located: Located,
    identity: Identity,
    encoder: Encoder,
    progress: Progress,
    engine: EngineSettings,
) -> None:
    """Read one source's distributions.

    A block with NaN or infinity is put aside with its reason. Whatever the engine, it is this
    process that writes.

    Raises:
        ModelError: the model cannot be loaded.
        NumericsError: more blocks than the recipe allows have NaN or infinity.
        TokenizerError: its tokenizer changes more blocks than the recipe allows.
        ClusterError: no cluster is there as asked, or its workers are lost again and again.
            Finished shards are kept, whatever is raised.
    """
    corpus = open_corpus(run)
    with StageWriter.open(externalized_folder(run, name), identity) as folder:
        if folder.complete:
            return
        names = shard_names(corpus, "train-")
        left = [shard for shard in names if shard not in folder.shards]
        blocks_of = {shard: int(corpus.shards[shard]["counts"]["blocks"]) for shard in names}
        tally = _Aside(recipe, name, folder, sum(blocks_of.values()))
        tally.check()  # again, without a model: the recipe may allow more by now

        def write(shard: str, done: Done) -> None:
            write_encoded(folder, shard, done.shard, done.counts)
            tally.check()

        def begin(device: str, weights_sha256: str) -> None:
            folder.describe(_about(recipe, located, encoder, device, weights_sha256))

        def load(shard: str) -> list[Block]:
            return read_shard(corpus, shard)

        with progress.start(f"reading {name}", tally.blocks, "blocks") as bar:
            bar.advance(sum(blocks_of[shard] for shard in names if shard not in left))
            if left:
                task = Task(recipe, located, encoder, left, load, begin, write, bar, progress.say)
                ENGINES[engine.name](task, engine)
        tally.check()
        _tell_changed(progress, name, len(tally.of(WALK_FAILED)), tally.blocks)
        folder.finish(_sum_counts(folder))


def _about(
    recipe: Recipe, located: Located, encoder: Encoder, device: str, weights_sha256: str
) -> dict[str, Any]:
    """What a reader without the recipe needs to know."""
    model = describe(located)
    del model["fingerprint"]
    return {
        "kind": "distributions",
        **model,
        "commit": located.commit,
        "weights_sha256": weights_sha256,
        "dtype": located.settings.precision,
        "vocabulary": len(encoder.vocabulary),
        "externalize": recipe.externalize.model_dump(exclude={"batch_tokens"}),
        "step_nats": STEP_NATS,
        "error_nats": ERROR_NATS,
        "device": device,
    }


def _tell_changed(progress: Progress, name: str, changed: int, blocks: int) -> None:
    if changed:
        progress.say(
            f"{name}: {changed:,} of {blocks:,} blocks are left out, because its tokenizer changes "
            "their text"
        )


class _Aside:
    """Blocks that a source could not read, over all its shards."""

    def __init__(self, recipe: Recipe, name: str, folder: StageFolder, blocks: int) -> None:
        self._recipe, self._name, self._folder, self.blocks = recipe, name, folder, blocks

    def of(self, reason: str) -> list[tuple[int, str]]:
        """(number, document) of the blocks that were put aside for a reason."""
        return [
            (number, document)
            for shard in self._folder.shards.values()
            for number, document, why in shard["counts"].get("aside", [])
            if why == reason
        ]

    def check(self) -> None:
        """Raises NumericsError or TokenizerError where there are more than the recipe allows."""
        allowed = self._recipe.externalize
        not_finite, changed = self.of(NOT_FINITE), self.of(WALK_FAILED)
        if len(not_finite) > allowed.not_finite_share * self.blocks:
            raise NumericsError(
                f"source {self._name!r} gives NaN or infinity on {self._too_many(not_finite)} "
                f"externalize.not_finite_share: {allowed.not_finite_share:g} allows. Try another "
                "dtype for it, or check its weights. Finished shards are kept; whatever reads them "
                "anew needs --redo"
            )
        if len(changed) > allowed.changed_share * self.blocks:
            raise TokenizerError(
                f"the tokenizer of source {self._name!r} changes {self._too_many(changed)} "
                f"externalize.changed_share: {allowed.changed_share:g} allows. Take a model whose "
                "tokenizer keeps text as it is, or raise that share"
            )

    def _too_many(self, found: list[tuple[int, str]]) -> str:
        number, document = min(found)
        first = f"the first is block {number}, document {document!r}"
        return f"{len(found)} of {self.blocks} blocks ({first}), more than"


def _sum_counts(folder: StageFolder) -> dict[str, int]:
    rows = [shard["counts"] for shard in folder.shards.values()]
    keys = {key for row in rows for key, value in row.items() if isinstance(value, int)}
    return {key: sum(row.get(key, 0) for row in rows) for key in sorted(keys)}
