"""Conversations as blocks: as much of their ends as there is room for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusellm.tokens.blocks import cut_point
from fusellm.tokens.conversation import Conversation, Message


def within(conversation: Conversation, most_bytes: int) -> tuple[Conversation, int] | None:
    """A conversation of at most so many bytes of messages and tools.

    Whole turns, a question with all that answers it, are taken away from the front, and never the
    system message. Where the last turn alone is too long, it ends with the answer that passes the
    limit, which is cut, or with the one before what does.

    Returns:
        (the conversation, how many turns were taken away); None where not even the beginning of an
        answer fits.
    """
    messages = list(conversation.messages)
    sizes = [_bytes(message) for message in messages]
    fixed = sum(sizes[:1]) if messages[0]["role"] == "system" else 0
    fixed += len(json.dumps(conversation.tools)) if conversation.tools else 0
    begins = [n for n, message in enumerate(messages) if message["role"] == "user"]
    useful = [n for n in begins if any(n < one for one in conversation.learnt)]
    for taken, start in enumerate(useful):
        if fixed + sum(sizes[start:]) <= most_bytes:
            return (conversation if not taken else _from(conversation, start)), taken
    if not useful:
        return None
    start, taken = useful[-1], len(useful) - 1
    end = None  # what is behind the last answer that fits
    for n in (n for n in conversation.learnt if n > start):
        room = most_bytes - fixed - sum(sizes[start:n])
        if sizes[n] <= room:
            end = n + 1
            continue
        data = messages[n]["content"].encode()
        said = data[: cut_point(data[:room], data[room])].decode() if 4 <= room < len(data) else ""
        if said.strip():
            messages[n] = {"role": messages[n]["role"], "content": said}
            return _from(_until(conversation, messages, n + 1, cut=True), start), taken
        break
    if end is None:
        return None
    return _from(_until(conversation, messages, end, cut=False), start), taken


def _until(
    conversation: Conversation, messages: Sequence[Message], end: int, cut: bool
) -> Conversation:
    """The messages before `end`."""
    learnt = tuple(n for n in conversation.learnt if n < end)
    return Conversation(tuple(messages[:end]), learnt, cut, conversation.tools)


def _from(conversation: Conversation, start: int) -> Conversation:
    """Without the messages before `start`, but for the system's."""
    messages = conversation.messages
    head = 1 if messages[0]["role"] == "system" and start > 0 else 0
    learnt = tuple(n - start + head for n in conversation.learnt if n >= start)
    return Conversation(
        (*messages[:head], *messages[start:]), learnt, conversation.cut, conversation.tools
    )


def bytes_of(conversation: Conversation) -> int:
    """Of its messages and tools, as `within` counts them."""
    tools = len(json.dumps(conversation.tools)) if conversation.tools else 0
    return tools + sum(map(_bytes, conversation.messages))


def _bytes(message: Mapping[str, Any]) -> int:
    """Of what a message says, and of what else it brings along."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return len(message["content"].encode()) + (len(json.dumps(more)) if more else 0)
