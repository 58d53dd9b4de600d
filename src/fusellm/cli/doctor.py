"""`fusellm doctor`: what fusellm finds where it runs, and what to do about it."""

from dataclasses import asdict
from pathlib import Path

import typer
from rich.table import Column
from rich.text import Text

from fusellm.cli.console import STDOUT, json_text
from fusellm.cli.draw import table
from fusellm.cli.options import Json, Out


def doctor(out: Out = None, as_json: Json = False) -> None:
    """Show versions, devices, memory, disk, hub and sandbox, and what to do where one is missing.

    Nothing is fetched and no model is loaded; of a token of the hub it says only whether there is
    one. It ends with 1 if something is missing that fusellm cannot do without.
    """
    from fusellm.explain.machine import examine

    findings = examine(out or Path("runs"))
    broken = any(one.cure and one.needed for one in findings)
    if as_json:
        print(json_text([asdict(one) for one in findings]))
        raise typer.Exit(int(broken))
    shown = table("", "", Column(overflow="fold"), title="fusellm doctor", show_header=False)
    before = ""
    for one in findings:
        topic = one.topic if one.topic != before else ""
        before = one.topic
        style = "red" if one.cure and one.needed else "yellow" if one.cure else ""
        told = Text(one.value, style)
        if one.cure:
            told.append(f"\n{one.cure}", "dim")
        shown.add_row(Text(topic, "bold"), one.name, told)
    STDOUT.print(shown)
    STDOUT.say("Something is missing that is needed." if broken else "All that is needed is here.")
    raise typer.Exit(int(broken))
