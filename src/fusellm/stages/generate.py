"""generate: a model's answers to the prompts of an entry of the corpus, once for good."""

from functools import cached_property
from typing import Any

from fusellm.config import BuiltinDocuments, FileDocuments
from fusellm.corpus.digests import digest_of_files
from fusellm.corpus.generated import Prompt, PromptDocuments, prompts_of
from fusellm.errors import CorpusError
from fusellm.models.load import default_device, describe, load_model
from fusellm.reading.writing import Writer, WrittenAnswer
from fusellm.stages.stage import Context, FilledStage
from fusellm.store.answers import GeneratedAnswer, write_answers
from fusellm.store.identity import Identity, digest
from fusellm.store.writer import StageWriter

SHARD_PROMPTS = 128  # as many are written again at most after an interruption
_COUNTED = ("prompts", "tokens", "empty", "cut")
_CHOOSES_NO_PROMPT = {"domain", "weight", "streaming"}


class GenerateStage(FilledStage):
    """The folder of the answers to one entry. Shards that are finished are never made anew.

    Raised besides: CorpusError, there is no prompt, or none was answered; ModelError, the model
    cannot be loaded, or memory does not suffice.
    """

    command = "generate"

    def __init__(self, context: Context, entry: int) -> None:
        """`entry`: its number in `corpus.documents`."""
        super().__init__(context, f"generate/{entry}")
        corpus = context.recipe.corpus
        documents = corpus.documents[entry]
        assert not isinstance(documents, BuiltinDocuments)
        self.documents: PromptDocuments = documents
        self.entry, self.settings = entry, corpus.generated[entry]
        self.reader = context.readers[self.settings.by]

    @cached_property
    def _identity(self) -> Identity:  # once, as it reads whole files
        located = self.reader.located
        corpus, documents = self.context.recipe.corpus, self.documents.identity()
        if self.settings.temperature == 0:  # nothing is drawn
            for key in ("seed", "top_p"):
                del documents["generated"][key]
        settings: dict[str, Any] = {
            "documents": {k: v for k, v in documents.items() if k not in _CHOOSES_NO_PROMPT},
            # Which prompts are in the part train, and how much of a conversation is read.
            "corpus": corpus.model_dump(
                include={"validation_share", "held_out_share", "block_bytes"}
            ),
            "dtype": located.settings.precision,
        }
        if isinstance(self.documents, FileDocuments):
            read = digest_of_files(self.documents, self.context.progress)
        else:
            read = digest([self.documents.hub, self.documents.config, self.documents.revision])
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
        """Answer the prompts that are not answered yet."""
        progress, by = self.context.progress, self.settings.by
        prompts = self._prompts()
        with progress.start(f"{by} answers", len(prompts), "prompts") as bar:
            writer: Writer | None = None
            for shard, start in enumerate(range(0, len(prompts), SHARD_PROMPTS)):
                asked = prompts[start : start + SHARD_PROMPTS]
                name = f"answers-{shard:05d}.arrow"
                if name in folder.shards:
                    bar.advance(len(asked))
                    continue
                writer = writer or self._load(folder)
                seed = self.settings.seed, shard
                written = writer.write([one.asked for one in asked], seed, bar.advance)
                self._tell(asked, written)
                answers = [_answer(*pair) for pair in zip(asked, written, strict=True)]
                write_answers(folder, name, start, answers)
        counts = [shard["counts"] for shard in folder.shards.values()]
        sums = {key: sum(one[key] for one in counts) for key in _COUNTED}
        if sums["empty"] == sums["prompts"]:
            raise CorpusError(
                f"{by} has answered none of {sums['prompts']:,} prompts with any text; what it "
                "cannot read is said above. Lower generated.max_new_tokens where its context is "
                "too short, or ask it by another template, or another model"
            )
        progress.say(
            f"{by} has answered {sums['prompts'] - sums['empty']:,} of {sums['prompts']:,} prompts "
            f"in {sums['tokens']:,} tokens; {sums['cut']:,} answers have no end of their own "
            f"(generated.max_new_tokens: {self.settings.max_new_tokens})"
        )
        folder.finish(sums)

    def _prompts(self) -> list[Prompt]:
        looks = f"looking for prompts for {self.settings.by}"
        with self.context.progress.start(looks, 0, "prompts") as bar:
            prompts = prompts_of(self.documents, self.context.recipe.corpus)
            bar.advance(len(prompts))
        return prompts

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


def _answer(asked: Prompt, written: WrittenAnswer) -> GeneratedAnswer:
    what = asked.document, asked.digest, written.text
    return GeneratedAnswer(*what, written.ends, written.tokens)
