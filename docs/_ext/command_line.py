"""The reference of the command line, made from the command line itself when the site is built.

It takes the place of the comment MARK in a page.
"""

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from typer.main import get_command

from fusellm.cli.main import app as fusellm_app

MARK = "<!-- generated: the command line -->"


def commands(command: Any = None, path: str = "fusellm") -> Iterator[tuple[str, Any]]:
    """Every command with its name in full, as `fusellm store info`; groups before their commands.

    Args:
        command: of a group, itself; fusellm if not given.
    """
    command = command or get_command(fusellm_app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from commands(inner, f"{path} {name}")


def page() -> str:
    """Markdown: a heading for every command, its help, arguments and options."""
    return "\n".join(line for path, command in commands() for line in _command(path, command))


def _command(path: str, command: Any) -> Iterator[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    given = [f"{_name(p)}{' …' if p.nargs == -1 else ''}" for p in arguments]
    given = [one if p.required else f"[{one}]" for one, p in zip(given, arguments, strict=True)]
    given += ["COMMAND"] if getattr(command, "commands", None) else []
    yield from (f"## {path}", "", "```text", " ".join([path, "[OPTIONS]", *given]), "```", "")
    yield from (_prose(command.help or ""), "")
    if inner := [name for name in getattr(command, "commands", {}) if path != "fusellm"]:
        yield from ("Commands: " + ", ".join(f"`{path} {name}`" for name in inner) + ".", "")
    rows = [_row(parameter, context) for parameter in command.params if not parameter.hidden]
    if rows:
        yield from ("| argument or option | | default |", "|---|---|---|", *rows, "")
    if command.epilog:
        yield from (_prose(command.epilog), "")


def _row(parameter: Any, context: Any) -> str:
    if parameter.param_type_name == "argument":
        spelled = _name(parameter)
    else:
        spelled, _ = parameter.get_help_record(context)
    told = parameter.help or ""
    if parameter.multiple and "may be repeated" not in told.lower():
        told = f"{told.removesuffix('.')}. May be repeated."
    default = "needed" if parameter.required else _default(parameter)
    return f"| `{_cell(spelled)}` | {_cell(_prose(told))} | {default} |"


def _name(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or value == () or value == [] or callable(value):
        return ""
    return f"`{_cell(str(getattr(value, 'value', value)))}`"


def _prose(text: str) -> str:
    """Help as Markdown: the marks of Click, and what would be taken for HTML, taken out."""
    text = text.replace("\b", "").replace("\f", "")
    return re.sub(r"<(?=[A-Za-z/])", r"\\<", text).strip()


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def put(_: Sphinx, __: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, page())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", put)
    return {"parallel_read_safe": True, "version": "1"}
