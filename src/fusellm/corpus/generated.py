"""Documents whose answers a model writes: their prompts, and the documents once it has.

Prompts are found, and answers joined to them, by reading the same documents in the same order
twice. Only the part train is generated: what is measured on is what records answer themselves.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fusellm.config import BuiltinDocuments, CorpusSettings, Documents
from fusellm.corpus.conversations import within
from fusellm.corpus.documents import BuiltinReader, read_documents
from fusellm.corpus.parts import Text
from fusellm.errors import StoreError
from fusellm.progress import Silent
from fusellm.store.answers import GeneratedAnswer
from fusellm.tokens.conversation import Conversation


class Prompt(NamedTuple):
    """What a model is to answer: a document's name, and a conversation or a text."""

    document: str
    asked: Conversation | str


def prompts_of(entry: Documents, corpus: CorpusSettings) -> Iterator[Prompt]:
    """The prompts of an entry, in the order of its documents; as many as it asks for.

    Of a conversation that does not fit into a block, its first turns are left out.

    Raises:
        CorpusError: a document cannot be read.
    """
    assert not isinstance(entry, BuiltinDocuments)
    assert entry.generated is not None
    left = entry.generated.prompts
    texts = read_documents(entry, corpus, Counter(), BuiltinReader(corpus, Silent()))
    for text in texts:
        if text.part != "train" or text.prompt is None:
            continue
        if left is not None:
            if left == 0:
                return
            left -= 1
        asked: Conversation | str | None = text.prompt
        if isinstance(text.prompt, Conversation):
            asked = _fitting(text.prompt, corpus.block_bytes)
        if asked is not None:
            yield Prompt(text.name, asked)


def _fitting(prompt: Conversation, most_bytes: int) -> Conversation | None:
    """A prompt that leaves room for an answer; None where its last question alone does not."""
    fitted = within(prompt.answered("."), most_bytes)
    if fitted is None or len(fitted[0].messages) < 2:
        return None
    kept = fitted[0]
    return Conversation(kept.messages[:-1], (), tools=kept.tools)


def with_answers(
    texts: Iterator[Text],
    answers: Iterator[GeneratedAnswer],
    block_bytes: int,
    counts: Counter[str],
) -> Iterator[Text]:
    """An entry's documents, those of the part train with what a model has answered.

    Prompts without an answer are left out, and counted.

    Args:
        answers: in the order of the documents.

    Raises:
        StoreError: an answer is of no document; the documents are not those that were answered.
    """
    following = next(answers, None)
    for text in texts:
        if text.part != "train":
            yield text
        elif following is None or text.name != following.document:
            counts["prompts_without_answer"] += text.prompt is not None
            if text.unusable is not None:  # of which the corpus says why
                yield text
        else:
            yield from _answered(text, following, block_bytes)
            following = next(answers, None)
    if following is not None:
        raise StoreError(
            f"the generated answers have one to {following.document}, which is no document of the "
            "corpus now; generate them anew, with --redo"
        )


def _answered(text: Text, answer: GeneratedAnswer, block_bytes: int) -> Iterator[Text]:
    if isinstance(text.prompt, Conversation):
        asked = _fitting(text.prompt, block_bytes)
        if asked is not None:
            whole = asked.answered(answer.text, cut=not answer.ends)
            yield Text(text.name, "train", whole.text, conversation=whole)
        return
    prompt = (text.prompt or "").encode("utf-8", "replace").decode("utf-8")
    context = ((0, len(prompt.encode())),) if prompt else ()
    yield Text(text.name, "train", prompt + answer.text, context, ends=answer.ends)
