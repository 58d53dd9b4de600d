"""The fields of a record that are its text or its conversation, and those that are context."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusellm.config import FileDocuments, HubDocuments
from fusellm.errors import CorpusError
from fusellm.tokens.conversation import Conversation, UnusableError, conversation_of, prompt_of

Spans = tuple[tuple[int, int], ...]

_WHOLE = re.compile(r"(?<=\d)\.0+$")
_SHOWN = 40  # characters of a label

_KINDS: dict[type, str] = {list: "a list", dict: "an object", bool: "true or false"}
_KINDS |= {int: "a number", float: "a number"}


@dataclass(frozen=True)
class Speech:
    """How a record is a conversation: what of it is learnt, and the field of its tools."""

    turns: str
    thinking: str
    tools_field: str | None


@dataclass(frozen=True)
class Fields:
    """Names of the fields, in order; `context` are those that a model is not asked to predict.

    Between two fields stands the separator, which belongs to the one before it. `where` has fields
    and the values that a record must have in them to be read. With `speech` records are
    conversations, and the fields have their messages. `are_prompts` says that a model answers them:
    what they answer themselves may be missing.
    """

    names: tuple[str, ...]
    context: frozenset[str]
    separator: str
    where: tuple[tuple[str, str], ...] = ()
    speech: Speech | None = None
    are_prompts: bool = False

    @classmethod
    def of(cls, entry: FileDocuments | HubDocuments) -> "Fields":
        """As an entry of the corpus has them."""
        given = entry.text_field if entry.messages is None else entry.messages
        names = (given,) if isinstance(given, str) else tuple(given)
        where = tuple((name, _label(value)) for name, value in entry.where.items())
        speech = None
        if entry.messages is not None:
            speech = Speech(entry.turns, entry.thinking, entry.tools_field)
        context = frozenset(entry.context_fields)
        generated = entry.generated is not None
        return cls(names, context, entry.field_separator, where, speech, generated)

    @property
    def are_named(self) -> bool:
        """Whether they are others than those of an entry that says nothing of fields."""
        return self.names != ("text",) or bool(self.where) or self.speech is not None

    @property
    def columns(self) -> list[str]:
        """All that are looked at."""
        tools = self.speech.tools_field if self.speech is not None else None
        names = (*self.names, *(name for name, _ in self.where), *([tools] if tools else []))
        return list(dict.fromkeys(names))

    @property
    def may_be_missing(self) -> frozenset[str]:
        """Those of an answer, where a model gives another one."""
        if not self.are_prompts:
            return frozenset()
        own = self.names[1:] if self.speech is not None else self.names
        return frozenset(own) - self.context if self.context or self.speech else frozenset()

    @property
    def key(self) -> str:
        """The key of a recipe that names the fields of the text."""
        return "text_field" if self.speech is None else "messages"

    def other_label(self, row: object, place: str) -> str | None:
        """The first value of a record that is not the one that is asked for; None if all are.

        Raises:
            CorpusError: it has no such field.
        """
        for name, value in self.where:
            if not isinstance(row, Mapping) or name not in row:
                raise _missing(row, name, place, "where")
            if _label(row[name]) != value:
                label = " ".join(_label(row[name]).split())
                return f"{name}: {label[:_SHOWN]}{'…' if len(label) > _SHOWN else ''}"
        return None

    def none_chosen(self, place: str, labels: Sequence[str]) -> CorpusError:
        """What is wrong where no record has the values that are asked for.

        Args:
            labels: some that records have.
        """
        asked = ", ".join(f"{name}: {value}" for name, value in self.where)
        return CorpusError(
            f"corpus.documents: no record of {place} has {asked}; there are {', '.join(labels)}. "
            "Set where to one of these, or leave the entry out (or a split of a dataset)"
        )

    def conversation(self, row: object, place: str) -> Conversation | str:
        """A record's conversation; of one that is none that can be learnt from, why.

        Raises:
            CorpusError: a field is missing.
        """
        assert self.speech is not None
        for name in self.names[:1] if self.are_prompts else self.names:
            if not isinstance(row, Mapping) or name not in row:
                raise _missing(row, name, place, self.key)
        assert isinstance(row, Mapping)
        speech = self.speech
        values = [row.get(name) for name in self.names]
        return _written(conversation_of, values, self._tools(row), speech.turns, speech.thinking)

    def _tools(self, row: Mapping[str, Any]) -> Any:
        assert self.speech is not None
        return None if self.speech.tools_field is None else row.get(self.speech.tools_field)

    def prompt(self, row: object, place: str) -> Conversation | str | None:
        """What a model is to answer: a conversation, or a text. None of one that cannot be used.

        Raises:
            CorpusError: a field is missing, or holds no text.
        """
        if self.speech is None:
            names = tuple(name for name in self.names if name in self.context) or self.names
            text, _ = replace(self, names=names, context=frozenset()).text(row, place)
            if not text.strip():
                return None
            text += self.separator * (names != self.names)
            return text.encode("utf-8", "replace").decode("utf-8")
        if not isinstance(row, Mapping) or self.names[0] not in row:
            raise _missing(row, self.names[0], place, self.key)
        values = [row.get(name) for name in self.names]
        one = _written(prompt_of, values, self._tools(row), self.speech.thinking)
        return None if isinstance(one, str) else one

    def answers(self, row: object) -> bool:
        """Whether a record of text has an answer of its own."""
        own = [name for name in self.names if name not in self.context]
        is_there = isinstance(row, Mapping) and all(row.get(name) for name in own)
        return bool(self.context) and bool(own) and is_there

    def text(self, row: object, place: str) -> tuple[str, Spans]:
        """A record's text, and which of its bytes in UTF-8 are context.

        Raises:
            CorpusError: a field is missing, or holds no text; null counts as none.
        """
        values = [_value(row, name, place) for name in self.names]
        if len(values) == 1:
            return values[0], ()
        parts, spans, end = [], [], 0
        for n, (name, value) in enumerate(zip(self.names, values, strict=True)):
            part = value + (self.separator if n < len(values) - 1 else "")
            data = part.encode("utf-8", "replace")
            parts.append(data.decode("utf-8"))
            if name in self.context and data:
                spans.append((end, end + len(data)))
            end += len(data)
        return "".join(parts), tuple(spans)


def _written(read: Callable[..., Conversation], *of: Any) -> Conversation | str:
    """A conversation that is read from a record; of one that cannot be, why."""
    try:
        one = read(*of)
        one.to_json().encode()
    except UnusableError as error:
        return str(error)
    except (RecursionError, TypeError, UnicodeEncodeError) as error:
        return f"it cannot be written as JSON: {' '.join(str(error).split())[:100]}"
    return one


def _value(row: object, name: str, place: str) -> str:
    if not isinstance(row, Mapping) or name not in row:
        raise _missing(row, name, place, "text_field")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), type(value).__name__)
        raise CorpusError(
            f"{place}: field {name!r} holds {kind} and no text; set text_field, or make one text "
            "of it first"
        )
    return value


def _missing(row: object, name: str, place: str, key: str) -> CorpusError:
    known = ", ".join(map(str, row)) if isinstance(row, Mapping) else "no fields"
    return CorpusError(f"{place} has no field {name!r} (it has: {known}); set {key}")


def _label(value: object) -> str:
    """A value as it is compared: true of JSON and of CSV are one, and so are 1 and 1.0.

    >>> _label(True), _label("TRUE"), _label(1.0), _label("1.0"), _label("Python")
    ('true', 'true', '1', '1', 'Python')
    """
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    return _WHOLE.sub("", text)
