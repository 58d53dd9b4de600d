"""The fields of a record that are its text, and those of them that are context."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusellm.config import FileDocuments, HubDocuments
from fusellm.errors import CorpusError

Spans = tuple[tuple[int, int], ...]

_WHOLE = re.compile(r"(?<=\d)\.0+$")
_SHOWN = 40  # characters of a label

_KINDS: dict[type, str] = {list: "a list", dict: "an object", bool: "true or false"}
_KINDS |= {int: "a number", float: "a number"}


@dataclass(frozen=True)
class Fields:
    """Names of the fields, in order; `context` are those that a model is not asked to predict.

    Between two fields stands the separator, which belongs to the one before it. `where` has fields
    and the values that a record must have in them to be read.
    """

    names: tuple[str, ...]
    context: frozenset[str]
    separator: str
    where: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, entry: FileDocuments | HubDocuments) -> "Fields":
        """As an entry of the corpus has them."""
        names = (entry.text_field,) if isinstance(entry.text_field, str) else entry.text_field
        where = tuple((name, _label(value)) for name, value in entry.where.items())
        return cls(tuple(names), frozenset(entry.context_fields), entry.field_separator, where)

    @property
    def are_named(self) -> bool:
        """Whether they are others than those of an entry that says nothing of fields."""
        return self.names != ("text",) or bool(self.where)

    @property
    def columns(self) -> list[str]:
        """All that are looked at."""
        return list(dict.fromkeys((*self.names, *(name for name, _ in self.where))))

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
