"""Conversations: messages of several speakers, and which of them are learnt.

A conversation's shared text is what its learnt messages say, one after another. It is all that two
models have in common of it: what stands around them is each one's own template.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fusellm.errors import ArgumentError

ASSISTANT = "assistant"

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
        tools: Sequence[Message] = (),
    ) -> "Conversation":
        """Messages as OpenAI has them, of which what the assistant says is learnt.

        Args:
            messages: each with `role` and `content`, a text, and what the role may have besides.
            turns: `all` learns all that the assistant says, `last` its last message.
            tools: that the assistant may call.

        Raises:
            ArgumentError: something is no message, or the assistant says nothing.

        >>> Conversation.of([{"role": "user", "content": "Two?"},
        ...                  {"role": "assistant", "content": "2"}]).learnt
        (1,)
        """
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ArgumentError(f"message {number} is none: it needs role and content")
            if not isinstance(message.get("content"), str):
                raise ArgumentError(f"message {number}: its content is no text")
        learnt = [
            number
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT and message["content"].strip()
        ]
        if not learnt:
            raise ArgumentError("the assistant says nothing, so that there is nothing to learn")
        return cls(
            tuple(messages), tuple(learnt[-1:] if turns == "last" else learnt), tools=tuple(tools)
        )

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
