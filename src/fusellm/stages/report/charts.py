"""Charts as inline SVG in the page's CSS variables, so that one serves the light and dark scheme.

One unit of an SVG is one CSS pixel at the page's phone width. y grows downwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

from fusellm.evaluation.compare.comparison import Comparison, Difference, Line, Pair
from fusellm.evaluation.compare.tables import number, pairs_of, span, title_of, with_interval

SERIES = 8
"""Colours for sources; a ninth source has the first one's colour again."""

_WIDTH = 340.0
_LINES_HEIGHT = 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 72.0, 12.0, 36.0
_LABEL, _BAR, _GAP = 18.0, 20.0, 14.0
_ROW, _MARGIN = 34.0, 4.0
_NAME, _SMALL = 12.0, 11.0
"""Sizes of text."""
_APART = 14.0
"""Least distance of the names at the ends of lines."""
_MOST_POINTS = 240
_PIXELS_OF_A_SHARE = 32.0
"""A segment narrower than this has no number in it."""
_COLOURS = {-1: "ink", 0: "muted", 1: "fused"}
"""Of a difference, by its sign."""


@dataclass(frozen=True)
class Trace:
    """`values` over `tokens`, in a named colour."""

    name: str
    colour: str
    tokens: Sequence[float]
    values: Sequence[float]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class StackedBar:
    """One stacked bar: its segments' amounts by name, and a note at its right end."""

    name: str
    note: str
    amounts: Mapping[str, float]


def colour_of_series(index: int) -> str:
    """The name of a source's colour."""
    return f"series-{index % SERIES + 1}"


def colour_of_situation(situation: str) -> str:
    """The name of a situation's colour: that of nothing where the source says nothing."""
    return "none" if situation == "unaligned" else situation


def amount(value: float) -> str:
    """A large count in few characters.

    >>> [amount(x) for x in (0, 950, 1500, 50_000, 2.5e6, 1.8e9)]
    ['0', '950', '1.5 k', '50 k', '2.5 M', '1.8 B']
    """
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share in whole percent, of which neither 0 nor 100 is claimed when it is not so.

    >>> [percent(x) for x in (0, 0.001, 0.5, 0.999, 1)]
    ['0 %', '<1 %', '50 %', '>99 %', '100 %']
    """
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 <= share < 1:
        return ">99 %"
    return f"{share:.0%}".replace("%", " %")


def line_chart(label: str, unit: str, traces: Sequence[Trace]) -> str:
    """Curves over tokens, each named with its last value at its end.

    Args:
        label: what the chart is, for readers who do not see it; the values are added.
        unit: of the values.
    """
    foot, right = _LINES_HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    x, x_ticks = _axis([t for c in traces for t in c.tokens], 0.03, (_LEFT, right), 4)
    y, y_ticks = _axis([v for c in traces for v in c.values], 0.08, (foot, _TOP), 5)
    digits = max((len(f"{tick:.10g}".partition(".")[2]) for tick in y_ticks), default=0)
    drawn = [_axis_line(foot, (_LEFT, right), [(x(tick), amount(tick)) for tick in x_ticks])]
    drawn.append(_text((_LEFT + right) / 2, _LINES_HEIGHT - 3, "tokens", anchor="middle"))
    for tick in y_ticks:
        drawn.append(_path([(_LEFT, y(tick)), (right, y(tick))], "rule", 0.8))
        drawn.append(_text(_LEFT - 6, y(tick) + 4, number(tick, digits), anchor="end"))
    for curve in traces:
        points = [(x(t), y(v)) for t, v in zip(*_thinned(curve), strict=True)]
        drawn.append(_path(points, curve.colour, 1.6 if curve.dashed else 2.0, curve.dashed))
        if curve.dots or len(points) == 1:
            drawn += [_dot(at, 1.8, curve.colour) for at in points]
    ends = _parted([y(curve.values[-1]) for curve in traces])
    for curve, at in zip(traces, ends, strict=True):
        drawn.append(_text(right + 3, at + 4, f"{curve.name} {curve.values[-1]:.3f}", curve.colour))
    told = "; ".join(
        f"{c.name} from {c.values[0]:.3f} to {c.values[-1]:.3f} {unit}" for c in traces
    )
    return _svg(f"{label}: {told}", _LINES_HEIGHT, drawn)


def bar_chart(label: str, bars: Sequence[StackedBar], colours: Mapping[str, str]) -> str:
    """Stacked horizontal bars of full width, each segment with its share where there is room.

    Args:
        colours: segment name to colour name, in the order of drawing.
    """
    drawn, told = [], []
    for index, bar in enumerate(bars):
        top, left = index * (_LABEL + _BAR + _GAP), 0.0
        total = sum(bar.amounts.get(name, 0) for name in colours)
        shares = {name: bar.amounts.get(name, 0) / total if total else 0.0 for name in colours}
        told.append(f"{bar.name}: " + ", ".join(f"{n} {percent(s)}" for n, s in shares.items()))
        drawn.append(_text(0, top + 12, _shortened(bar.name), "ink", _NAME))
        drawn.append(_text(_WIDTH, top + 12, bar.note, anchor="end"))
        for name, share in shares.items():
            width = share * _WIDTH
            if width:
                edge = f"stroke: var(--page); stroke-width: {min(1.0, width / 3):.2f}"
                drawn.append(
                    f'<rect x="{left:.2f}" y="{top + _LABEL:g}" width="{width:.2f}" '
                    f'height="{_BAR:g}" style="fill: var(--{colours[name]}); {edge}"/>'
                )
            if width >= _PIXELS_OF_A_SHARE:
                place = left + width / 2, top + _LABEL + _BAR / 2 + 4
                drawn.append(_text(*place, percent(share), f"on-{colours[name]}", anchor="middle"))
            left += width
    height = len(bars) * (_LABEL + _BAR + _GAP) - _GAP + 2
    return _svg(f"{label}. {'; '.join(told)}", height, drawn)


def differences_chart(comparison: Comparison, pair: Pair | None = None) -> str:
    """Each task's difference in points with its 95 % interval, the mean last: a forest plot.

    A filled mark is a difference that is shown after Holm's correction, a hollow one is not.

    Args:
        pair: (a, b) of a − b; the last of the comparison's if None, which is fused − CLM where
            there is a CLM baseline. Tasks on a scale of their own are left out.

    Returns:
        Empty if there is nothing to draw.
    """
    known = pairs_of(comparison)
    pair = pair or (known[-1] if known else None)
    rows = [
        (line, one)
        for line in comparison.lines
        for one in line.differences
        if one.pair == pair and line.in_points
    ]
    if pair is None or not rows:
        return ""
    foot = _MARGIN + len(rows) * _ROW
    ends = (_MARGIN, _WIDTH - _MARGIN)
    values = [0.0, *(v for _, one in rows for v in (one.value, *(one.interval or ())))]
    x, ticks = _axis(values, 0.05, ends, 6)
    drawn = [_axis_line(foot, ends, [(x(tick), _tick(tick)) for tick in ticks])]
    drawn.append(_text(_WIDTH / 2, foot + _BOTTOM - 3, "points", anchor="middle"))
    drawn.append(_path([(x(0), _MARGIN), (x(0), foot)], "muted", 1.0))
    if rows[-1][0] is comparison.mean and len(rows) > 1:
        drawn.append(_path([(ends[0], foot - _ROW), (ends[1], foot - _ROW)], "rule", 0.8))
    for index, (line, one) in enumerate(rows):
        drawn += _difference(line, one, _MARGIN + index * _ROW, x)
    told = "; ".join(f"{line.task} {number(one.value)}, {_told(one)}" for line, one in rows)
    title = f"{title_of(*pair)} in points on {comparison.suite}"
    return _svg(f"{title}: {told}", foot + _BOTTOM, drawn)


def _difference(line: Line, one: Difference, top: float, x: Callable[[float], float]) -> list[str]:
    colour, middle = _COLOURS[one.sign], top + 25
    interval = [(x(end), middle) for end in one.interval or ()]
    return [
        _text(_MARGIN, top + 14, _shortened(line.task), "ink", _NAME),
        _text(_WIDTH - _MARGIN, top + 14, with_interval(one), anchor="end"),
        *([_path(interval, colour, 2.0)] if interval else []),
        _dot((x(one.value), middle), 3.5, colour, hollow=not one.sign),
    ]


def _told(one: Difference) -> str:
    interval = span(one.low, one.high)
    return f"95 % interval {interval}" if interval else "no interval"


def _tick(value: float) -> str:
    """A tick's value with as many digits as it needs.

    >>> _tick(-2.5), _tick(0.0), _tick(10.0)
    ('−2.5', '0', '10')
    """
    return f"{value + 0.0:g}".replace("-", "−")


def _shortened(text: str, most: int = 28) -> str:
    """A text that fits beside a bar."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _thinned(curve: Trace) -> tuple[Sequence[float], Sequence[float]]:
    """At most `_MOST_POINTS` points, each the mean of as many neighbours."""
    if len(curve.tokens) <= _MOST_POINTS:
        return curve.tokens, curve.values
    tokens, values = (
        [float(part.mean()) for part in np.array_split(np.asarray(all_), _MOST_POINTS)]
        for all_ in (curve.tokens, curve.values)
    )
    return tokens, values


def _parted(heights: Sequence[float]) -> list[float]:
    """Heights at least `_APART` from each other, as near to their own as may be."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    parted, last = [0.0] * len(heights), float("-inf")
    for index in order:
        last = max(heights[index], last + _APART)
        parted[index] = last
    shift = (last - heights[order[-1]]) / 2  # half the push each way
    return [at - shift for at in parted]


def _axis(
    values: Sequence[float], margin: float, ends: tuple[float, float], most: int
) -> tuple[Callable[[float], float], list[float]]:
    """Where values are drawn between two ends, and round numbers for ticks."""
    low, high = min(values), max(values)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    scale = (ends[1] - ends[0]) / (high - low)
    return (
        lambda value: ends[0] + (value - low) * scale,
        [float(tick) for tick in ticks if low <= tick <= high],
    )


def _axis_line(y: float, ends: tuple[float, float], ticks: Sequence[tuple[float, str]]) -> str:
    labels = [_text(x, y + 15, label, anchor="middle") for x, label in ticks]
    return "\n".join([_path([(ends[0], y), (ends[1], y)], "rule", 0.8), *labels])


def _text(
    x: float, y: float, text: str, colour: str = "muted", size: float = _SMALL, anchor: str = ""
) -> str:
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    style = f"fill: var(--{colour}); font-size: {size:g}px"
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchored} style="{style}">{escape(text)}</text>'


def _path(
    points: Sequence[tuple[float, float]], colour: str, width: float, dashed: bool = False
) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = "; stroke-dasharray: 6.4 4" if dashed else ""
    style = f"fill: none; stroke: var(--{colour}); stroke-width: {width:g}{dashes}"
    return f'<polyline points="{places}" style="{style}"/>'


def _dot(at: tuple[float, float], radius: float, colour: str, hollow: bool = False) -> str:
    style = f"fill: var(--{'page' if hollow else colour}); stroke: var(--{colour})"
    return (
        f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" '
        f'style="{style}; stroke-width: 1.6"/>'
    )


def _svg(label: str, height: float, drawn: Sequence[str]) -> str:
    """A drawing; `label` says what it shows to readers who do not see it."""
    head = f'viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}"'
    return f'<svg {head} xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(drawn) + "\n</svg>\n"
