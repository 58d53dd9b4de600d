"""YAML as recipes are written in it: nothing is lost, and nothing grows."""

import re
from typing import Any

import yaml

from fusellm.errors import RecipeError

_MOST_VALUES = 10_000  # where each use of an anchor counts as all that it stands for
_MOST_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data; refuses keys that are written twice, and bombs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values, self._depth = 0, 0
        self._sizes: dict[int, int] = {}  # of finished nodes, by id: an anchor may stand for them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next value with all that is in it."""
        before, is_alias = self._values, self.check_event(yaml.AliasEvent)
        line = self.current_event.start_mark.line + 1
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise RecipeError(f"line {line}: blocks are nested more than {_MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise RecipeError(f"line {line}: an alias inside of what it stands for; write it out")
        self._values += self._sizes[id(node)] if is_alias else 1
        if self._values > _MOST_VALUES:
            raise RecipeError(
                f"line {line}: more than {_MOST_VALUES:,} values, aliases written out"
            )
        if not is_alias:
            self._sizes[id(node)] = self._values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping, each of whose keys is written once."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {line}: a key must be a word, and this is a {key.id}")
            if key.value in lines:
                raise RecipeError(
                    f"key {key.value!r} is written twice, in line {lines[key.value]} and in line "
                    f"{line}; keep one of them"
                )
            lines[key.value] = line
        return node


# YAML 1.2, where 1e-5 is a number, which YAML 1.1 reads as text, and 2026-01-31 is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The value that a text is in YAML.

    Raises:
        RecipeError: it is not YAML, a key is written twice, or it is larger than any recipe; the
            message says in which line.

    >>> read_yaml("a: {b: 1e-5}")
    {'a': {'b': 1e-05}}
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        words = filter(None, (error.context, error.problem))
        raise RecipeError(f"{where}this is not YAML: {', '.join(words)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character, or a number such as 0x_
        raise RecipeError(f"this is not YAML: {' '.join(str(error).split())}") from None
