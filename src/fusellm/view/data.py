"""Blocks and positions as the pages take them: numbers, and text that is fit to be shown.

Text goes through `visible`: white space as signs, nothing that changes how what stands around it is
read. The pages put it in as text alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fusellm.explain.grid import grid, visible
from fusellm.explain.predictions import Predicted, Predictions
from fusellm.explain.views import (
    Before,
    BlockView,
    OutcomeView,
    PositionView,
    Share,
    SourceView,
    letter_of,
)

_KEPT, _OUTCOMES, _MEMBERS = 16, 12, 8
"""How many of a list are shown; how many more there are is said."""
_ASKED = 600  # characters of what stands before an answer


def block_data(view: BlockView) -> dict[str, Any]:
    """A block: its rows on one grid, and what is known of each of its positions."""
    strips = [view.target.strip, *(source.tokens.strip for source in view.sources)]
    drawn = grid(view.text, strips)
    rows = [
        {"cells": row.cells, "first": row.first, "last": row.last, "read": tokens.read}
        for row, tokens in zip(
            drawn.rows, [view.target, *(source.tokens for source in view.sources)], strict=True
        )
    ]
    asked = view.asked if len(view.asked) <= _ASKED else "…" + view.asked[-_ASKED:]
    names = [source.name for source in view.sources]
    return {
        "block": view.block,
        "answer": view.answer,
        "positions": view.positions,
        "asked": visible(asked),
        "width": drawn.width,
        "cuts": drawn.cuts,
        "boundaries": sorted(drawn.boundaries.values()),
        "rows": rows,
        "spelled": [visible(token) for token in view.target.spelled],
        "sources": [_source(s, source) for s, source in enumerate(view.sources)],
        "winners": [None if name is None else names.index(name) for name in view.winners],
        "at": None if view.at is None else view.at.position,
    }


def _rounded(probability: float) -> float:
    return round(probability, 6)


def _source(s: int, source: SourceView) -> dict[str, Any]:
    return {
        "name": source.name,
        "letter": letter_of(s),
        "positions": source.positions,
        "situations": source.situations,
        "weights": [round(weight, 4) for weight in source.weights],
    }


def position_data(view: BlockView, at: PositionView) -> dict[str, Any]:
    """One position: what each source says before and after the map, and the fused distribution."""
    true = at.next_spelled
    return {
        "position": at.position,
        "next": visible(at.next_spelled),
        "read_bytes": at.read_bytes,
        "before": [
            {"silence": view.silence(at, s)} if before is None else _before(before, true)
            for s, before in enumerate(at.before)
        ],
        "fused": [_share(share, true) for share in at.fused],
    }


def _before(before: Before, true: str) -> dict[str, Any]:
    return {
        "next": [visible(token) for token in before.next_spelled],
        "healed": before.healed,
        "kept": [
            {
                "token": visible(entry.spelled),
                "id": entry.id,
                "probability": _rounded(entry.probability),
                "becomes": entry.outcome,
            }
            for entry in before.kept[:_KEPT]
        ],
        "more_kept": max(len(before.kept) - _KEPT, 0),
        "tail": _rounded(before.tail),
        **_outcomes(before.becomes, true),
        "nowhere": _rounded(before.nowhere),
    }


def _outcomes(outcomes: Sequence[OutcomeView], true: str) -> dict[str, Any]:
    """The first outcomes, and the one of the true next token wherever it stands."""
    shown = [one for n, one in enumerate(outcomes) if n < _OUTCOMES or one.true]
    left_out = outcomes[_OUTCOMES:]
    mass = sum(one.probability for one in left_out if not one.true)
    return {
        "outcomes": [_outcome(one, true) for one in shown],
        "more": len(outcomes) - len(shown),
        "mass_of_more": _rounded(mass),
    }


def _outcome(outcome: OutcomeView, true: str) -> dict[str, Any]:
    tokens = list(outcome.spelled[:_MEMBERS])
    if outcome.true and true not in tokens:
        tokens[-1] = true
    return {
        "tokens": [visible(token) for token in tokens],
        "more": max(len(outcome.spelled) - _MEMBERS, 0),
        "probability": _rounded(outcome.probability),
        "true": outcome.true,
        "leftover": outcome.leftover,
    }


def _share(share: Share, true: str) -> dict[str, Any]:
    return {
        "source": share.source,
        "weight": _rounded(share.weight),
        "rest": _rounded(share.rest),
        **_outcomes(share.outcomes, true),
    }


def predictions_data(said: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """What the target and the models trained from it say, in their order."""
    return [
        {
            "name": name,
            "true": [_rounded(one) for one in own.true],
            "rank": own.rank,
            "divergence": [None if bits is None else round(bits, 4) for bits in own.divergence],
            "best": [_best(tokens) for tokens in own.best],
        }
        for name, own in said.items()
    ]


def _best(tokens: Sequence[Predicted]) -> list[tuple[str, float]]:
    return [(visible(one.spelled), _rounded(one.probability)) for one in tokens]
