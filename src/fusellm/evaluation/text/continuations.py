"""What a model writes behind the beginnings of held-out documents, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from fusellm.config import GeneratedSettings
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.reading.writing import Writer
from fusellm.store.blocks import Block
from fusellm.store.continuations import Beginning, ModelText
from fusellm.tokens.conversation import ASSISTANT, Conversation

NEW_TOKENS = 48
_CHARACTERS = 240  # of a beginning, about 50 tokens
_TRUTH_CHARACTERS = 6 * NEW_TOKENS
CHOICE = f"1: {_CHARACTERS} characters, {NEW_TOKENS} tokens"
"""Changed with the rules by which beginnings are chosen and gone on with."""


@dataclass(frozen=True)
class Start:
    """A beginning; `asked` is what a model reads of it."""

    beginning: Beginning
    asked: Conversation | str


def chosen_starts(blocks: Sequence[Block], count: int, seed: int) -> list[Start]:
    """Beginnings of held-out documents, of one domain after another.

    Args:
        blocks: of all documents, in order.
        count: how many; fewer where there are fewer documents.
    """
    firsts: dict[tuple[str, str], Block] = {}
    for block in blocks:
        firsts.setdefault((block.domain, block.document), block)
    by_domain: dict[str, list[Start]] = {}
    for block in firsts.values():
        start = _start_of(block)
        if start is not None:
            by_domain.setdefault(block.domain, []).append(start)
    chance = np.random.default_rng(seed)
    shuffled = [[own[n] for n in chance.permutation(len(own))] for own in by_domain.values()]
    most = max(map(len, shuffled), default=0)
    in_turn = [own[n] for n in range(most) for own in shuffled if n < len(own)]
    return in_turn[:count]


def _start_of(block: Block) -> Start | None:
    """How a document begins; None of one that has nothing to begin with, or to go on with."""
    if block.conversation is not None:
        return _first_turn(block.domain, block.conversation)
    text, cut = block.text, _cut(block)
    if not text[:cut].strip() or not text[cut:].strip():
        return None
    shown, truth = text[:cut], text[cut : cut + _TRUTH_CHARACTERS]
    return Start(Beginning(block.domain, shown, truth), shown)


def _cut(block: Block) -> int:
    """Where a block's beginning ends, in characters: no white space is last, and no word is cut."""
    text = block.text
    if block.context and block.context[0][0] == 0:  # a prompt, which a model is not to predict
        return len(text.encode()[: block.context[0][1]].decode())
    limit = min(_CHARACTERS, len(text) // 2)
    spaces = [n for n in range(limit // 2, limit) if text[n].isspace()]
    return len(text[: spaces[-1] if spaces else limit].rstrip())


def _first_turn(domain: str, conversation: Conversation) -> Start | None:
    """A conversation up to the first answer."""
    messages = conversation.messages
    at = next((n for n, one in enumerate(messages) if one["role"] == ASSISTANT), 0)
    if at == 0:
        return None
    asked = Conversation(messages[:at], (), tools=conversation.tools)
    says = [one["content"] for one in asked.messages]
    if at > 1:  # who says what is plain of one message alone
        says = [f"{one['role']}: {one['content']}" for one in asked.messages]
    truth = messages[at]["content"][:_TRUTH_CHARACTERS]
    return Start(Beginning(domain, "\n\n".join(says), truth), asked)


def continued(
    name: str, model: PreTrainedModel, reader: Reader, starts: Sequence[Start], progress: Progress
) -> list[ModelText]:
    """What a model writes behind each beginning, its likeliest token each time.

    Whatever a model cannot do is said in place of its text: nothing depends on it.
    """
    with progress.start(f"{name} continues texts", len(starts), "texts") as bar:
        try:
            context = reader.located.context_tokens
            most = NEW_TOKENS if context is None else max(min(NEW_TOKENS, context // 2), 1)
            settings = GeneratedSettings(temperature=0, max_new_tokens=most, batch_size=8)
            writer = Writer(model, reader.encoder, context, settings)
            written = writer.write([start.asked for start in starts], [0], bar.advance)
        except Exception as error:  # of any model's own code
            progress.say(f"{name} continues no text for the report: {error}")
            why = f"this model could not write ({type(error).__name__})"
            return [ModelText("", missing=why) for _ in starts]
    return [ModelText(one.text, one.ends, one.left_out) for one in written]
