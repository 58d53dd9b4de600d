"""The explorer's pages as HTML. What comes from a run is escaped; data stand in them as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusellm.alignment.positions import MEANINGS
from fusellm.explain.documents import DocumentWins, Passage, grouped
from fusellm.explain.grid import visible
from fusellm.explain.tokenizers import TokenizerComparison
from fusellm.explain.views import BlockView, letter_of, settings_in_words
from fusellm.stages.report import page as report
from fusellm.view.data import block_data
from fusellm.view.opened import OpenedRun

PASSAGES = 50
_PAGES = Path(__file__).parent / "pages"
_MOST_CELLS = 400
"""Of the map, in a domain; where there are more documents, neighbours share one."""
SERVED_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'"
)
# Firefox takes no file for the page's own ('self'), and a file may ask nobody.
EXPORTED_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src data:; "
    "form-action 'none'; base-uri 'none'"
)
_SAID = {name: f"{meaning}.".replace("'", "’") for name, meaning in MEANINGS.items()}


def asset(name: str) -> str:
    """The text of `view.css` or `view.js`; colours are those of the report."""
    text = (_PAGES / name).read_text(encoding="utf-8")
    if name == "view.css":
        colours = Path(report.__file__).parent / "colours.css"
        text = colours.read_text(encoding="utf-8") + text
    return text


def page_of_block(number: int, answer: int | None = None) -> str:
    """The name of a block's page; of a conversation it shows the first answer.

    >>> page_of_block(40), page_of_block(40, 0), page_of_block(40, 1)
    ('block-40.html', 'block-40.html', 'block-40-answer-1.html')
    """
    return f"block-{number}-answer-{answer}.html" if answer else f"block-{number}.html"


def page_of_tokenizer(place: int) -> str:
    """The name of the page that compares the tokenizer of a source, by its place."""
    return f"tokenizer-{place + 1}.html"


class Pages:
    """Makes the pages of an opened run.

    `exported` are the blocks that an export has, None where a server has them all; only these are
    linked to.
    """

    def __init__(self, opened: OpenedRun, exported: Sequence[int] | None = None) -> None:
        self._opened, self._exported = opened, exported
        self._has = None if exported is None else frozenset(exported)
        self._names = [source.name for source in opened.recipe.sources]
        self._environment = report.environment(_PAGES)

    def _render(self, template: str, here: str, **values: Any) -> str:
        tokenizers = [
            {"name": _plain(name), "page": page_of_tokenizer(place)}
            for place, name in enumerate(self._names)
        ]
        whole: dict[str, Any] = {
            "run": _plain(self._opened.recipe.name),
            "policy": SERVED_POLICY if self._has is None else EXPORTED_POLICY,
            "sources": tokenizers,
            "letters": [letter_of(s) for s in range(len(self._names))],
            "here": here,
        }
        return self._environment.get_template(template).render(**(whole | values))

    def waiting(self, here: str, what: str, waits: str) -> str:
        """A page that is loaded again when the job behind `waits` is done."""
        return self._render("waiting.html.jinja", here, what=what, waits=waits)

    def fault(self, title: str, message: str) -> str:
        """What cannot be shown, and why."""
        return self._render("fault.html.jinja", "", title=title, message=_plain(message))

    def index(
        self,
        documents: Sequence[DocumentWins] | None,
        passages: Sequence[Passage] | None = None,
        wanted: str = "",
        fault: str = "",
    ) -> str:
        """The overview.

        Args:
            documents: wins of each; None while they are counted.
            passages: what was found, or the blocks of an export.
            fault: why wins cannot be counted.
        """
        said = ""
        if passages is not None and self._exported is None:
            count = len(passages)
            said = "nothing was found" if not count else f"{count} blocks"
            said = f"the first {PASSAGES} blocks" if count == PASSAGES else said
        recipe = self._opened.recipe
        facts = {"target": recipe.target.model, "blocks": f"{self._opened.blocks:,}"}
        return self._render(
            "index.html.jinja",
            "index",
            blocks=self._opened.blocks,
            exported=self._exported,
            facts=[(k, _plain(v)) for k, v in (facts | settings_in_words(recipe)).items()],
            passages=None if passages is None else [_passage(one) for one in passages],
            said_of_passages=said,
            wanted=wanted,
            fault=_plain(fault),
            wins=None if documents is None else list(self._by_domain(documents)),
            map=[] if documents is None else list(self._map(documents)),
            said_of_map=_said_of_map(documents or []),
        )

    def _by_domain(self, documents: Sequence[DocumentWins]) -> Iterable[dict[str, Any]]:
        for domain, own in _domains(documents).items():
            positions = sum(one.positions for one in own)
            wins = [sum(float(one.wins[s]) for one in own) for s in range(len(self._names))]
            shares = [won / max(positions, 1) for won in wins]
            yield {
                "domain": _plain(domain),
                "shares": shares,
                "nobody": max(1 - sum(shares), 0.0),
                "positions": positions,
            }

    def _map(self, documents: Sequence[DocumentWins]) -> Iterable[tuple[str, list[Any]]]:
        for domain, own in _domains(documents).items():
            yield _plain(domain), [self._cell(group) for group in grouped(own, _MOST_CELLS)]

    def _cell(self, group: Sequence[DocumentWins]) -> dict[str, Any]:
        first, positions = group[0], max(sum(one.positions for one in group), 1)
        wins = [sum(float(one.wins[s]) for one in group) for s in range(len(self._names))]
        winner = max(range(len(wins)), key=wins.__getitem__) if sum(wins) > 0 else None
        named = _plain(first.name)
        if len(group) > 1:
            named = f"{len(group)} documents from {named} on"
        shares = ", ".join(
            f"{_plain(name)} {100 * won / positions:.0f} %"
            for name, won in zip(self._names, wins, strict=True)
        )
        blocks = [n for one in group for n in range(one.first, one.first + one.blocks)]
        shown = blocks if self._has is None else [n for n in blocks if n in self._has]
        return {
            "page": page_of_block(shown[0]) if shown else None,
            "colour": 0 if winner is None else winner % 8 + 1,
            "letter": "–" if winner is None else letter_of(winner),
            "said": f"{named}, {positions:,} positions: {shares}",
        }

    def block(
        self,
        view: BlockView,
        positions: Sequence[Mapping[str, Any]] | None = None,
        predictions: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A block.

        Args:
            positions: all of them, where no server can be asked; `predictions` likewise.
        """
        facts = {"document": view.document, "domain": f"{view.domain}, {view.bytes:,} bytes"}
        facts |= settings_in_words(self._opened.recipe)
        before, after = self._neighbours(view.block)
        here = page_of_block(view.block, view.answer)
        return self._render(
            "block.html.jinja",
            here,
            view=view,
            before=before,
            after=after,
            answers=[page_of_block(view.block, n) for n in range(view.answers)],
            facts=[(name, _plain(value)) for name, value in facts.items()],
            situations=_SAID,
            table=[_row(view, s) for s in range(len(view.sources))],
            data=block_data(view),
            positions=positions,
            predictions=predictions,
            models=predictions is not None or (self._has is None and self._opened.asks_models),
        )

    def _neighbours(self, number: int) -> tuple[str | None, str | None]:
        if self._exported is None:
            last = self._opened.blocks - 1
            before = number - 1 if number > 0 else None
            after = number + 1 if number < last else None
        else:
            before = max((n for n in self._exported if n < number), default=None)
            after = min((n for n in self._exported if n > number), default=None)
        return (
            None if before is None else page_of_block(before),
            None if after is None else page_of_block(after),
        )

    def tokenizer(self, place: int, compared: TokenizerComparison) -> str:
        """The tokenizer of a source, by its place, beside the target's."""
        source, classes = _plain(self._names[place]), compared.classes
        sides = [(name, say(compared.source), say(compared.target)) for name, say in _SIDES.items()]
        return self._render(
            "tokenizers.html.jinja",
            page_of_tokenizer(place),
            source=source,
            verdict=compared.verdict(source, "the target"),
            sides=sides,
            situations=_SAID,
            domains=[
                {
                    "name": _plain(domain.name),
                    "cells": [
                        f"{domain.positions:,}",
                        *(_share(domain.situations[n], domain.positions) for n in _SAID),
                        _share(domain.in_single_classes, domain.positions),
                        str(sum(domain.left_out)),
                    ],
                }
                for domain in compared.domains
            ],
            said_of_classes=(
                f"{classes.classes:,} classes are the finest events that both vocabularies tell "
                f"apart; {classes.single:,} of them are one target token each."
            ),
            largest=[
                {
                    "root": visible(one.root),
                    "target_tokens": f"{one.target_tokens:,}",
                    "source_tokens": f"{one.source_tokens:,}",
                    "members": [visible(member) for member in one.members],
                }
                for one in classes.largest
            ],
        )


def _plain(text: str) -> str:
    """A text in one line as people write it, but nothing that changes how it is read."""
    return "".join(" " if character == " " else visible(character) for character in text)


_SIDES: dict[str, Callable[[Any], str]] = {
    "tokens": lambda side: f"{side.tokens:,}",
    "in the other too": lambda side: f"{side.shared_tokens:,} ({100 * side.shared_share:.1f} %)",
    "kind": lambda side: side.kind,
    "space put before a text": lambda side: side.dummy_prefix,
    "put before a text": lambda side: " ".join(map(visible, side.prefix)) or "nothing",
    "ends a text": lambda side: "nothing" if side.eos is None else visible(side.eos),
    "tokens of single bytes": lambda side: f"{side.fallback_tokens:,}",
}


def _share(count: int, of: int) -> str:
    return f"{100 * count / max(of, 1):.1f} %"


def _domains(documents: Sequence[DocumentWins]) -> dict[str, list[DocumentWins]]:
    by_domain: dict[str, list[DocumentWins]] = {}
    for one in documents:
        by_domain.setdefault(one.domain, []).append(one)
    return by_domain


def _said_of_map(documents: Sequence[DocumentWins]) -> str:
    most = max((len(own) for own in _domains(documents).values()), default=0)
    each = "A cell is a document"
    if most > _MOST_CELLS:
        each = f"A cell is up to {-(-most // _MOST_CELLS):,} documents that follow one another"
    return f"{each}, with the letter and colour of the source that won most of it."


def _passage(one: Passage) -> dict[str, Any]:
    texts = {name: visible(getattr(one, name)) for name in ("before", "match", "after")}
    return texts | {
        "block": one.block,
        "document": _plain(one.document),
        "domain": _plain(one.domain),
    }


def _row(view: BlockView, s: int) -> dict[str, Any]:
    source = view.sources[s]
    bits = "–" if source.bits_per_byte is None else f"{source.bits_per_byte:.3f}"
    counts = [str(source.situations.count(name)) for name in _SAID]
    won = f"{sum(source.weights):.4g}"
    read = [str(len(source.tokens.ids)), *counts, won, bits]
    unread = ["could not read it", *["–"] * (len(_SAID) + 2)]
    return {
        "letter": letter_of(s),
        "name": _plain(source.name),
        "referee": source.referee,
        "cells": read if source.tokens.read else unread,
    }
