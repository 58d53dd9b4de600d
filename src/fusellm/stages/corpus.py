"""corpus: documents to blocks, once for all models."""

from functools import cached_property

from fusellm.config import BuiltinDocuments, FileDocuments, HubDocuments, Recipe
from fusellm.corpus.cutting import write_corpus
from fusellm.corpus.digests import digest_of_files
from fusellm.progress import Progress
from fusellm.stages.stage import Context, FilledStage
from fusellm.store.answers import read_answers
from fusellm.store.identity import Identity, digest
from fusellm.store.writer import StageWriter, software_versions
from fusellm.zoo.text import RULES


class CorpusStage(FilledStage):
    """The folder `corpus`. One that was not finished is begun anew."""

    command = "corpus"
    goes_on = False

    def __init__(self, context: Context) -> None:
        """The corpus of a run, which reads what was generated for it."""
        generated = context.recipe.corpus.generated
        super().__init__(context, after=tuple(f"generate/{entry}" for entry in generated))

    @cached_property
    def _identity(self) -> Identity:  # once, as it reads whole files
        context = self.context
        made = identity_of_corpus(
            context.recipe, context.target.tokenizer_fingerprint, context.progress
        )
        answers = {name: context.fingerprint(name) for name in self.after}
        return Identity(made.stage, made.settings, {**made.inputs, **answers})

    def identity(self) -> Identity:
        """What the corpus is made from."""
        return self._identity

    def fill(self, folder: StageWriter) -> None:
        """Cut the documents."""
        encode = self.context.target.encoder.encode
        write_corpus(
            self.context.recipe,
            folder,
            lambda text: len(encode([text], [True])[0].ids),
            self.context.progress,
            lambda entry: read_answers(self.context.run, entry),
        )


def identity_of_corpus(recipe: Recipe, target_tokenizer: str, progress: Progress) -> Identity:
    """What the corpus is made from. Files of many bytes are read once, with a bar.

    Args:
        target_tokenizer: fingerprint of the target's tokenizer, which a budget in tokens reads.

    Raises:
        CorpusError: a file is missing, cannot be read, or is of no known kind.
    """
    settings = {"corpus": recipe.corpus.identity()}
    inputs: dict[str, str] = {}
    for n, entry in enumerate(recipe.corpus.documents):
        if isinstance(entry, BuiltinDocuments):
            versions = software_versions()
            read = {name: versions[name] for name in ("python", "torch", "transformers", "numpy")}
            inputs[f"documents.{n}"] = digest(read | {"rules": RULES})
        elif isinstance(entry, FileDocuments):
            inputs[f"documents.{n}"] = digest_of_files(entry, progress)
        elif isinstance(entry, HubDocuments):
            inputs[f"documents.{n}"] = digest([entry.hub, entry.config, entry.revision])
    if recipe.corpus.train_tokens is not None:
        inputs["target_tokenizer"] = target_tokenizer
    return Identity("corpus", settings, inputs)
