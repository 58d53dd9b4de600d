"""generate: a model's answers to the prompts of an entry of the corpus, once for good."""

from functools import cached_property
from typing import Any

from fusellm.config import FileDocuments
from fusellm.corpus.digests import digest_of_files
from fusellm.corpus.generated import Prompt, prompts_of
from fusellm.errors import CorpusError
from fusellm.models.load import default_device, describe, load_model
from fusellm.reading.writing import Writer, WrittenAnswer
from fusellm.stages.stage import Context, FilledStage
from fusellm.store.answers import GeneratedAnswer, write_answers
from fusellm.store.identity import Identity, digest
from fusellm.store.writer import StageWriter


class GenerateStage(FilledStage):
    """The folder of the answers to one entry. Shards that are finished are never made anew.

    Raised besides: CorpusError, no prompt could be answered; ModelError, the model cannot be
    loaded, or memory does not suffice.
    """

    command = "generate"

    def __init__(self, context: Context, entry: int) -> None:
        """`entry`: its number in `corpus.documents`."""
        super().__init__(context, f"generate/{entry}")
        corpus = context.recipe.corpus
        self.entry, self.documents = entry, corpus.documents[entry]
        self.settings = corpus.generated[entry]
        self.reader = context.readers[self.settings.by]

    @cached_property
    def _identity(self) -> Identity:  # once, as it reads whole files
        recipe, located = self.context.recipe, self.reader.located
        corpus, documents = recipe.corpus, self.documents
        settings: dict[str, Any] = {
            "documents": documents.identity(),
            # Which prompts are in the part train, and how much of a conversation is read.
            "corpus": corpus.model_dump(
                include={"validation_share", "held_out_share", "block_bytes"}
            ),
            "dtype": located.settings.precision,
        }
        if isinstance(documents, FileDocuments):
            read = digest_of_files(documents, self.context.progress)
        else:
            read = digest(documents.identity())
        inputs = {
            f"documents.{self.entry}": read,
            "weights": located.fingerprint,
            "tokenizer": self.reader.tokenizer_fingerprint,
        }
        return Identity(self.name, settings, inputs)

    def identity(self) -> Identity:
        """What the answers are made from."""
        return self._identity

    def fill(self, folder: StageWriter) -> None:
        """GeneratedAnswer the prompts that are not answered."""
        context, by = self.context, self.settings.by
        with context.progress.start(f"looking for prompts for {by}", 0, "prompts") as bar:
            prompts: list[Prompt] = []
            for prompt in prompts_of(self.documents, context.recipe.corpus):
                prompts.append(prompt)
                bar.advance()
        if not prompts:
            raise CorpusError(
                f"corpus.documents.{self.entry} has no prompt that {by} could answer: check its "
                "fields, and that questions are shorter than corpus.block_bytes"
            )
        size = context.recipe.corpus.shard_blocks
        with context.progress.start(f"{by} answers", len(prompts), "prompts") as bar:
            writer: Writer | None = None
            for shard, start in enumerate(range(0, len(prompts), size)):
                name, asked = f"answers-{shard:05d}.arrow", prompts[start : start + size]
                if name in folder.shards:
                    bar.advance(len(asked))
                    continue
                writer = writer or self._load(folder)
                seed = self.settings.seed, shard
                written = writer.write([one.asked for one in asked], seed, bar.advance)
                self._tell(asked, written)
                write_answers(folder, name, start, _answers(asked, written))
        counts = [shard["counts"] for shard in folder.shards.values()]
        sums = {key: sum(one[key] for one in counts) for key in _COUNTED}
        if sums["empty"] == sums["prompts"]:
            raise CorpusError(
                f"{by} has answered none of {sums['prompts']:,} prompts with any text; ask it by "
                "another template, or another model"
            )
        context.progress.say(
            f"{by} has answered {sums['prompts'] - sums['empty']:,} of {sums['prompts']:,} prompts "
            f"in {sums['tokens']:,} tokens; {sums['cut']:,} answers are cut at "
            f"generated.max_new_tokens: {self.settings.max_new_tokens}"
        )
        folder.finish(sums)

    def _load(self, folder: StageWriter) -> Writer:
        located = self.reader.located
        about = {"kind": "answers", **describe(located), "commit": located.commit}
        folder.describe(about | {"dtype": located.settings.precision})
        model = load_model(located, default_device())
        return Writer(model, self.reader.encoder, located.context_tokens, self.settings)

    def _tell(self, asked: list[Prompt], written: list[WrittenAnswer]) -> None:
        left_out = [n for n, one in enumerate(written) if one.left_out is not None]
        if left_out:
            first = left_out[0]
            self.context.progress.say(
                f"{self.settings.by} cannot read {len(left_out):,} of {len(asked):,} prompts; the "
                f"first is {asked[first].document}: {written[first].left_out}"
            )


_COUNTED = ("prompts", "tokens", "empty", "cut")


def _answers(asked: list[Prompt], written: list[WrittenAnswer]) -> list[GeneratedAnswer]:
    return [
        GeneratedAnswer(prompt.document, one.text, one.ends, one.tokens)
        for prompt, one in zip(asked, written, strict=True)
    ]
