"""Conversations: messages of several speakers, and which of them are learnt.

A conversation's shared text is what its learnt messages say, one after another. It is all that two
models have in common of it: what stands around them is each one's own template.

Records are conversations whatever layout they have:

    OpenAI      messages: [{role: user, content: …}, {role: assistant, content: …}, …]
    ShareGPT    conversations: [{from: human, value: …}, {from: gpt, value: …}, …]
    two fields  prompt and completion, each a text or a list of messages as above

What cannot be a conversation is told by `UnusableError`, and counted by who reads a corpus: of a
million records some always are odd.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fusellm.errors import ArgumentError

ASSISTANT = "assistant"
_TURNS = ("all", "last")

Message = Mapping[str, Any]
"""As chat templates take them: `role`, `content`, and what else the role may have."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order.

    Attributes:
        messages: of it; the content of each is text.
        learnt: numbers of those whose content is learnt, ascending.
        cut: whether the last message goes on where this one stops, so that no turn ends there.
        tools: that the assistant may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    learnt: tuple[int, ...]
    cut: bool = False
    tools: tuple[Message, ...] = ()

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        turns: Literal["all", "last"] = "all",
        thinking: Literal["keep", "drop"] = "keep",
        tools: Sequence[Message] = (),
    ) -> "Conversation":
        """Messages as OpenAI or ShareGPT has them, of which what the assistant says is learnt.

        They are read as those of a corpus: what nobody answers is left out at the end.

        Args:
            messages: each with `role` and `content`, and what the role may have besides.
            turns: `all` learns all that the assistant says, `last` its last message.
            thinking: `drop` takes `<think>…</think>` away from the beginning of what it says.
            tools: that the assistant may call.

        Raises:
            ArgumentError: something is no message, roles are out of order, or the assistant says
                nothing.

        >>> Conversation.of([{"role": "user", "content": "Two?"},
        ...                  {"role": "assistant", "content": "2"}]).learnt
        (1,)
        """
        if turns not in _TURNS:
            raise ArgumentError(f"turns={turns!r} is none of {', '.join(_TURNS)}")
        try:
            return conversation_of([messages], tools, turns, thinking)
        except UnusableError as error:
            raise ArgumentError(f"it cannot be learnt from: {error}") from None

    @cached_property
    def text(self) -> str:
        """The shared text: the learnt messages' contents, one after another.

        >>> asked, told = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
        >>> Conversation((asked, told, asked, told), (1, 3)).text
        '22'
        """
        return "".join(self.messages[n]["content"] for n in self.learnt)

    @cached_property
    def span_ends(self) -> tuple[int, ...]:
        """Where each learnt message ends in the shared text, in bytes of UTF-8."""
        ends, end = [], 0
        for n in self.learnt:
            end += len(self.messages[n]["content"].encode())
            ends.append(end)
        return tuple(ends)

    def answered(self, text: str, cut: bool = False) -> "Conversation":
        """This one with one more answer behind it, which alone is learnt.

        >>> asked = Conversation(({"role": "user", "content": "Two?"},), ())
        >>> asked.answered("2").text
        '2'
        """
        answer = {"role": ASSISTANT, "content": text}
        return Conversation((*self.messages, answer), (len(self.messages),), cut, self.tools)

    def to_json(self) -> str:
        """Itself as one line of JSON."""
        told = {name: getattr(self, name) for name in ("messages", "learnt", "cut", "tools")}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """What `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.

        >>> one = Conversation(({"role": "assistant", "content": "Yes."},), (0,))
        >>> Conversation.from_json(one.to_json()) == one
        True
        """
        raw = json.loads(text)
        lists = (tuple(raw[name]) for name in ("messages", "learnt", "tools"))
        messages, learnt, tools = lists
        if list(learnt) != sorted(set(learnt)) or min(learnt, default=0) < 0:
            raise ValueError(f"{learnt} are no numbers of messages")
        return cls(messages, learnt, bool(raw["cut"]), tools)


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
