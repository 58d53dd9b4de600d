"""Documents whose answers a model writes: their prompts, and the documents once it has.

Prompts are found, and answers joined to them, by reading the same documents in the same order
twice; a digest of each prompt says that they are the same. Only the part train is generated: what
is measured on is what records answer themselves.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fusellm.config import BuiltinDocuments, CorpusSettings, FileDocuments, HubDocuments
from fusellm.corpus.conversations import bytes_of, within
from fusellm.corpus.documents import BuiltinReader, read_documents
from fusellm.corpus.parts import Text
from fusellm.errors import CorpusError, StoreError
from fusellm.progress import Silent
from fusellm.store.answers import GeneratedAnswer
from fusellm.store.identity import digest
from fusellm.tokens.blocks import cut_point
from fusellm.tokens.conversation import Conversation

PromptDocuments = FileDocuments | HubDocuments
_BYTES_OF_A_TOKEN = 4  # of an answer, for the room that is kept for it
_THOUGHT = re.compile(r"\s*<think>(.*?</think>\s*|.*\Z)", re.DOTALL)


class Prompt(NamedTuple):
    """What a model is to answer.

    Attributes:
        document: its name.
        asked: a conversation, or a text.
        room: bytes that an answer may have, so that both fit into a block.
    """

    document: str
    asked: Conversation | str
    room: int

    @property
    def digest(self) -> str:
        """Of what is asked."""
        return digest(self.asked if isinstance(self.asked, str) else self.asked.to_json())


def prompts_of(entry: PromptDocuments, corpus: CorpusSettings) -> list[Prompt]:
    """The prompts of an entry, in the order of its documents; as many as it asks for.

    Raises:
        CorpusError: a document cannot be read, there is no prompt, or nothing to measure on.
    """
    assert entry.generated is not None
    _require_measurable(corpus)
    most, prompts = entry.generated.prompts, list[Prompt]()
    for text in _read(entry, corpus):
        if len(prompts) == most:
            break
        prompt = _prompt_of(text, entry, corpus.block_bytes)
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise CorpusError(
            f"corpus.documents, domain {entry.domain!r}, has no prompt to be answered: check its "
            "fields, and that questions leave room for an answer in corpus.block_bytes: "
            f"{corpus.block_bytes} (generated.max_new_tokens takes {_BYTES_OF_A_TOKEN} bytes a "
            "token of it, half of it at most)"
        )
    return prompts


def _require_measurable(corpus: CorpusSettings) -> None:
    """Check that records with answers of their own are left to validate and to measure on.

    Where an entry is not generated, it has them; the corpus says so if not.

    Raises:
        CorpusError: there are none.
    """
    if len(corpus.generated) < len(corpus.documents):
        return
    missing = {"validation", "held_out"}
    for entry in corpus.documents:
        assert not isinstance(entry, BuiltinDocuments)
        for text in _read(entry, corpus):
            missing.discard(text.part)
            if not missing:
                return
    raise CorpusError(
        f"corpus.documents: no record with an answer of its own is in {' or '.join(missing)}, so "
        "that there would be nothing to measure on; give the corpus another entry whose records "
        "have answers (docs/generated.md), or raise corpus.validation_share and held_out_share"
    )


def _read(entry: PromptDocuments, corpus: CorpusSettings) -> Iterator[Text]:
    return read_documents(entry, corpus, Counter(), BuiltinReader(corpus, Silent()))


def _prompt_of(text: Text, entry: PromptDocuments, block_bytes: int) -> Prompt | None:
    """What is asked of a document of the part train; None where there is no room for an answer."""
    if text.part != "train" or text.prompt is None or entry.generated is None:
        return None
    reserved = min(_BYTES_OF_A_TOKEN * entry.generated.max_new_tokens, block_bytes // 2)
    if isinstance(text.prompt, str):
        room = block_bytes - len(text.prompt.encode())
        return Prompt(text.name, text.prompt, room) if room >= reserved else None
    fitted = within(text.prompt.answered("x" * reserved), block_bytes)
    if fitted is None or fitted[0].cut or len(fitted[0].messages) < 2:
        return None
    *asked, answer = fitted[0].messages
    if len(answer["content"]) < reserved:
        return None
    kept = Conversation(tuple(asked), (), tools=text.prompt.tools)
    return Prompt(text.name, kept, block_bytes - bytes_of(kept))


def with_answers(
    texts: Iterator[Text],
    answers: Iterator[GeneratedAnswer],
    entry: PromptDocuments,
    block_bytes: int,
    counts: Counter[str],
) -> Iterator[Text]:
    """An entry's documents, those of the part train with what a model has answered.

    Prompts without an answer are left out, and counted.

    Args:
        answers: in the order of the documents.

    Raises:
        StoreError: an answer is to another prompt; the documents are not those that were answered.
    """
    following = next(answers, None)
    for text in texts:
        if text.part != "train":
            yield text
            continue
        if following is None or text.name != following.document:
            counts["prompts_without_answer"] += text.prompt is not None
            if text.unusable is not None:  # of which the corpus says why
                yield text
            continue
        prompt = _prompt_of(text, entry, block_bytes)
        if prompt is None or prompt.digest != following.prompt:
            break
        yield _answered(prompt, following, entry.thinking == "drop")
        following = next(answers, None)
    if following is not None:
        raise StoreError(
            f"the answers that were generated for domain {entry.domain!r} have one to "
            f"{following.document}, which is another prompt now, or none: the documents have "
            "changed since. Remove the run's folder generate, and they are answered anew"
        )


def _answered(prompt: Prompt, answer: GeneratedAnswer, drop_thinking: bool) -> Text:
    said, ends = answer.text, answer.ends
    if drop_thinking:
        said = said[thought.end() :] if (thought := _THOUGHT.match(said)) else said
    data = said.encode()
    if len(data) > prompt.room:
        said, ends = data[: cut_point(data[: prompt.room], data[prompt.room])].decode(), False
    if isinstance(prompt.asked, str):
        context = ((0, len(prompt.asked.encode())),)
        return Text(prompt.document, "train", prompt.asked + said, context, ends=ends)
    # As most templates have it, which take white space at the edges of an answer away.
    whole = prompt.asked.answered(said.strip(), cut=not ends)
    return Text(prompt.document, "train", whole.text, conversation=whole)
