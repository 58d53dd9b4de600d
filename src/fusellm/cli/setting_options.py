"""Options made from a recipe's settings, so that type, bounds and words are said in one place."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel

from fusellm.cli.options import folder


@dataclass(frozen=True)
class SettingOptions:
    """Which settings of a block have an option.

    Attributes:
        block: of a recipe, or like one.
        names: of the settings.
        flags: of options that are not called as their setting.
        metavars: by setting; of whole numbers it is N.
        kinds: types of those that a recipe has as text, such as paths.
    """

    block: type[BaseModel]
    names: Sequence[str]
    flags: Mapping[str, str] = field(default_factory=dict)
    metavars: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, command: Callable[..., None]) -> Callable[..., None]:
        """A command whose parameter `given` stands for all these options.

        It gets the settings that were given, as a recipe would have them.
        """
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            here = parameter.name == "given"
            parameters += map(self._option, self.names) if here else [parameter]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: _plain(values.pop(name)) for name in self.names}
            command(**values, given={name: one for name, one in given.items() if one is not None})

        # typer makes options of these.
        run.__dict__["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    def _option(self, name: str) -> inspect.Parameter:
        """The option of a setting."""
        setting = self.block.model_fields[name]
        kind: Any = setting.annotation
        bounds = setting.metadata
        if NoneType in get_args(kind):
            kind = next(one for one in get_args(kind) if one is not NoneType)
        if get_origin(kind) is Annotated:
            kind, inner = get_args(kind)
            bounds = inner.metadata
        kind = self.kinds.get(name, kind)
        given: dict[str, Any] = {"parser": folder} if kind is Path else {}
        for bound in bounds:
            # typer's ranges hold their ends: what is above 0 and whole is 1 or more, and of other
            # numbers the recipe's own check refuses 0.
            if hasattr(bound, "gt"):
                given["min"] = kind(bound.gt) + (kind is int)
            elif hasattr(bound, "ge"):
                given["min"] = kind(bound.ge)
            elif hasattr(bound, "le"):
                given["max"] = kind(bound.le)
        told = " ".join((setting.description or "").split())
        if get_origin(kind) is list:
            told += " May be repeated."
        elif setting.default and kind is not bool:
            told += f" Default: the recipe's, or {setting.default}."
        metavar = self.metavars.get(name, "N" if kind is int else None)
        flag = self.flags.get(name, f"--{name.replace('_', '-')}")
        unset = False if kind is bool else None
        option = typer.Option(unset, flag, metavar=metavar, help=told, show_default=False, **given)
        annotation = kind if kind is bool else kind | None
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
        )


def _plain(value: Any) -> Any:
    """What an option says, as a recipe would; None where it says nothing."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list):
        return [_plain(one) for one in value] or None
    return value or None if isinstance(value, bool) else value
