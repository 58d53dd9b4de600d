"""Differences between two models over the tasks of a suite, as a forest plot."""

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fusellm.evaluation.compare.comparison import Comparison, Difference, Line
from fusellm.evaluation.compare.tables import number, pairs_of, title_of, with_interval
from fusellm.stages.report.charts import SENTINELS, SMALL, TEXT, WIDTH, inline_svg, shortened

_ROW, _TOP, _BOTTOM = 34.0, 4.0, 36.0
_MARGIN = 4.0
_COLOURS = {-1: "ink", 0: "muted", 1: "fused"}
_TEXT_DOWN, _MARK_DOWN = 14.0, 25.0


def differences_chart(comparison: Comparison, pair: tuple[str, str] | None = None) -> str:
    """Each task's difference in points with its 95 % interval, the mean last, as inline SVG.

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
    height = _TOP + len(rows) * _ROW + _BOTTOM

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            (
                _MARGIN / WIDTH,
                _BOTTOM / height,
                1 - 2 * _MARGIN / WIDTH,
                1 - (_TOP + _BOTTOM) / height,
            )
        )
        _style(axes, rows, comparison.mean)
        for index, (line, one) in enumerate(rows):
            _draw_row(axes, index * _ROW, line, one)

    told = "; ".join(
        f"{line.task} {number(one.value)}, "
        + (
            f"95 % interval {' to '.join(map(number, one.interval))}"
            if one.interval
            else "no interval"
        )
        for line, one in rows
    )
    ident = "differences-" + re.sub(r"[^a-z0-9]+", "-", f"{comparison.suite}-{pair[0]}-{pair[1]}")
    return inline_svg(
        ident, f"{title_of(*pair)} in points on {comparison.suite}: {told}", height, draw
    )


def _style(axes: Axes, rows: list[tuple[Line, Difference]], mean: Line | None) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SENTINELS["rule"])
    drawn = [x for _, one in rows for x in (one.value, *(one.interval or ()))]
    least, most = min(0.0, *drawn), max(0.0, *drawn)
    room = 0.05 * (most - least) or 1.0
    axes.set_xlim(least - room, most + room)
    axes.set_ylim(len(rows) * _ROW, 0)
    axes.set_yticks([])
    axes.axvline(0, color=SENTINELS["muted"], linewidth=1.0)
    if mean is not None and rows[-1][0] is mean and len(rows) > 1:
        axes.axhline((len(rows) - 1) * _ROW, color=SENTINELS["rule"], linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.tick_params(length=0, pad=6, labelsize=SMALL, labelcolor=SENTINELS["muted"])
    axes.set_xlabel("points", fontsize=SMALL, color=SENTINELS["muted"], labelpad=3)


def _tick(value: float) -> str:
    """A tick's value with as many digits as it needs.

    >>> _tick(-2.5), _tick(0.0), _tick(10.0)
    ('−2.5', '0', '10')
    """
    return f"{value + 0.0:g}".replace("-", "−")


def _draw_row(axes: Axes, top: float, line: Line, one: Difference) -> None:
    colour = SENTINELS[_COLOURS[one.sign]]
    across = axes.get_yaxis_transform()
    axes.text(
        0,
        top + _TEXT_DOWN,
        shortened(line.task),
        fontsize=TEXT,
        color=SENTINELS["ink"],
        transform=across,
    )
    axes.text(
        1,
        top + _TEXT_DOWN,
        with_interval(one),
        fontsize=SMALL,
        color=SENTINELS["muted"],
        ha="right",
        transform=across,
    )
    middle = top + _MARK_DOWN
    if ends := one.interval:
        axes.plot(ends, [middle, middle], color=colour, linewidth=2.0)
    axes.plot(
        [one.value],
        [middle],
        marker="o",
        markersize=7,
        color=colour,
        markerfacecolor=colour if one.sign else SENTINELS["page"],
        markeredgewidth=1.6,
    )
