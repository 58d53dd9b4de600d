"""Records as conversations, whatever layout they have.

    OpenAI      messages: [{role: user, content: …}, {role: assistant, content: …}, …]
    ShareGPT    conversations: [{from: human, value: …}, {from: gpt, value: …}, …]
    two fields  prompt and completion, each a text or a list of messages as above

What cannot be a conversation is told by `UnusableError`, and counted by who reads the corpus: of a
million records some always are odd.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fusellm.tokens.blocks import cut_point
from fusellm.tokens.conversation import ASSISTANT, Conversation, Message

_ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "developer": "system",
} | {role: role for role in ("system", "user", ASSISTANT, "tool")}
_MAY_FOLLOW = {
    "system": ("",),
    "user": ("", "system", ASSISTANT),
    ASSISTANT: ("user", "tool"),
    "tool": (ASSISTANT, "tool"),
}
_THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class UnusableError(Exception):
    """A record is no conversation that can be learnt from, and why."""


def conversation_of(
    values: Sequence[Any], tools: Any = None, turns: str = "all", thinking: str = "keep"
) -> Conversation:
    """A record's conversation.

    Args:
        values: its messages, or a prompt and its completion.
        tools: that the assistant may call: a list, or that as JSON.
        turns: `all` learns all that the assistant says, `last` its last message.
        thinking: `drop` takes `<think>…</think>` away from the beginning of what it says.

    Raises:
        UnusableError: it is none, or nothing in it is to be learnt.

    >>> asked = {"from": "human", "value": "Two and two?"}
    >>> conversation_of([[asked, {"from": "gpt", "value": "Four."}]]).text
    'Four.'
    >>> conversation_of(["Two and two?", "Four."]).messages[0]
    {'role': 'user', 'content': 'Two and two?'}
    """
    messages = [
        message
        for value, role in zip(values, ("user", ASSISTANT), strict=False)
        for message in _messages(value, role if len(values) == 2 else None)
    ]
    while messages and messages[-1]["role"] != ASSISTANT:  # what nobody has answered
        messages.pop()
    _require_order(messages)
    _drop_thinking(messages, thinking)
    first = 0 if len(values) == 1 else len(list(_messages(values[0], "user")))
    learnt = [
        n
        for n, message in enumerate(messages)
        if n >= first and message["role"] == ASSISTANT and message["content"].strip()
    ]
    if not learnt:
        raise UnusableError("the assistant says nothing")
    return Conversation(
        tuple(messages), tuple(learnt[-1:] if turns == "last" else learnt), tools=_tools(tools)
    )


def prompt_of(values: Sequence[Any], tools: Any = None, thinking: str = "keep") -> Conversation:
    """A record's conversation up to its last question, of which nothing is learnt.

    Args:
        values, tools, thinking: as `conversation_of` takes them, or a question alone; of two values
            the first is the prompt.

    Raises:
        UnusableError: it is none, or nobody asks anything.

    >>> prompt_of(["Two and two?"]).messages
    ({'role': 'user', 'content': 'Two and two?'},)
    """
    messages = _asked(values[0]) if len(values) == 1 else list(_messages(values[0], "user"))
    while messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    _require_order(messages)
    _drop_thinking(messages, thinking)
    last = messages[-1] if messages else {"role": "system"}
    if last["role"] == "system" or (last["role"] == "user" and not last["content"].strip()):
        raise UnusableError("nobody asks anything")
    return Conversation(tuple(messages), (), tools=_tools(tools))


def _drop_thinking(messages: list[dict[str, Any]], thinking: str) -> None:
    for n, message in enumerate(messages):
        if message["role"] == ASSISTANT and thinking == "drop":
            said = _THINKING.match(message["content"])
            if said is not None:
                messages[n] = message | {"content": message["content"][said.end() :]}


def _asked(value: Any) -> list[dict[str, Any]]:
    """Messages, or those of a text that is a question: one that is no list in JSON."""
    if isinstance(value, str):
        try:
            is_list = isinstance(json.loads(value), list)
        except (ValueError, RecursionError):
            is_list = False
        if not is_list:
            return [{"role": "user", "content": _whole(value)}]
    return _messages(value, None)


def _require_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises UnusableError where a role follows one that it cannot follow."""
    before = ""
    for n, message in enumerate(messages):
        if before not in _MAY_FOLLOW[message["role"]]:
            raise UnusableError(
                f"message {n} is of {message['role']}, after "
                + (f"one of {before}" if before else "none")
            )
        before = message["role"]


def _messages(value: Any, role: str | None) -> list[dict[str, Any]]:
    """Messages as chat templates take them; a text is one of `role`, if that is given."""
    if isinstance(value, str):
        if role is not None:
            return [{"role": role, "content": value}]
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableError("it is text, and no list of messages") from None
    if not isinstance(value, list | tuple) or not all(isinstance(m, Mapping) for m in value):
        raise UnusableError("it is no list of messages")
    return [_message(one) for one in value]


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    named = given.get("role", given.get("from"))
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise UnusableError(f"a message is of {str(named)[:40]!r}, whom nobody knows")
    said = given.get("content", given.get("value"))
    if isinstance(said, list | tuple):  # parts, of which those that are text can be read
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in said):
            raise UnusableError("a message has parts that are no text")
        said = "".join(str(part.get("text", "")) for part in said)
    if said is not None and not isinstance(said, str):
        raise UnusableError(f"what a message says is a {type(said).__name__}, and no text")
    more = {
        key: given[key]
        for key in ("tool_calls", "tool_call_id", "name")
        if given.get(key) is not None
    }
    return {"role": role, "content": _whole(said or "")} | dict(_plain(more))


def _plain(value: Any) -> Any:
    """A value without what columns have put into it: absent keys as None, halves of characters."""
    if isinstance(value, Mapping):
        return {_whole(str(key)): _plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _whole(value) if isinstance(value, str) else value


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableError("its tools are no JSON") from None
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise UnusableError("its tools are no list of objects")
    return tuple(_plain(one) for one in value)


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
