"""`fusellm inspect RUN --block N`: one block of a finished fuse stage, to learn the method from."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fusellm.cli.console import json_text
from fusellm.cli.inspect_screen import screen

if TYPE_CHECKING:
    from fusellm.config import Recipe
    from fusellm.inspection import Inspection


def show(run: str, recipe: "Recipe", found: "Inspection", as_json: bool, console: Console) -> None:
    """Print a block, as JSON or for people."""
    if as_json:
        print(json_text(as_object(run, recipe, found)))
        return
    for part in screen(run, recipe, found):
        console.print(part, highlight=False)


def as_object(run: str, recipe: "Recipe", found: "Inspection") -> dict[str, Any]:
    """What `--json` prints: everything on the screen, and what it leaves out there."""
    view, fusion = found.view, recipe.fusion
    names = [source.name for source in view.sources]
    winners = [view.winner(n) for n in range(view.positions)]
    sources = []
    for source in view.sources:
        row = asdict(source)
        row["situations"] = [situation.name.lower() for situation in source.situations]
        sources.append(row)
    at = None if view.at is None else asdict(view.at)
    if at is not None:
        for name, before in zip(names, at["before"], strict=True):
            if before is not None:
                before["source"] = name
        for share in at["fused"]:
            share["source"] = names[share["source"]]
    return {
        "run": run,
        "block": found.block.number,
        "blocks": found.blocks,
        "document": found.block.document,
        "domain": found.block.domain,
        "bytes": len(found.block.text.encode()),
        "text": found.block.text,
        "recipe": {
            "strategy": fusion.strategy,
            "compatibility": fusion.compatibility,
            "token_healing": fusion.heals,
            "function": fusion.function,
            "granularity": fusion.granularity,
            "window_bytes": fusion.window_bytes,
            "cross_entropy": fusion.cross_entropy,
            "scheme": recipe.externalize.scheme,
        },
        "positions": view.positions,
        "target": asdict(view.target),
        "sources": sources,
        "winners": [None if winner is None else names[winner] for winner in winners],
        "at": at,
    }
