"""Charts as inline SVG that a page colours by its own CSS variables.

One unit of an SVG is one CSS pixel at the page's phone width. Colours are drawn as sentinels and
then written as `var(--name)`, so that one chart serves the light and the dark scheme.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

SERIES = 8
"""Colours for sources; a ninth source has the first one's colour again."""

SITUATIONS = ("same", "several", "beyond", "crossed", "unaligned")

SENTINELS = {  # a colour to draw with, by the name of its CSS variable
    "ink": "#010203",
    "muted": "#020304",
    "rule": "#030405",
    "page": "#040506",
    "fused": "#050607",
    "clm": "#060708",
    "none": "#070809",
    "on-none": "#08090a",
    "series-1": "#110101",
    "series-2": "#110202",
    "series-3": "#110303",
    "series-4": "#110404",
    "series-5": "#110505",
    "series-6": "#110606",
    "series-7": "#110707",
    "series-8": "#110808",
    "on-series-1": "#220101",
    "on-series-2": "#220202",
    "on-series-3": "#220303",
    "on-series-4": "#220404",
    "on-series-5": "#220505",
    "on-series-6": "#220606",
    "on-series-7": "#220707",
    "on-series-8": "#220808",
    "same": "#330101",
    "several": "#330202",
    "beyond": "#330303",
    "crossed": "#330404",
    "on-same": "#440101",
    "on-several": "#440202",
    "on-beyond": "#440303",
    "on-crossed": "#440404",
}
_NAMES = {sentinel: name for name, sentinel in SENTINELS.items()}

WIDTH = 340.0
_LINES_HEIGHT = 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 72.0, 12.0, 36.0
_LABEL, _BAR, _GAP = 18.0, 20.0, 14.0
TEXT, SMALL = 12.0, 11.0
_MOST_POINTS = 240
_PIXELS_OF_A_SHARE = 32.0
"""A segment narrower than this has no number in it."""


@dataclass(frozen=True)
class Line:
    """One curve: `values` over `tokens`, in a named colour."""

    name: str
    colour: str
    tokens: Sequence[float]
    values: Sequence[float]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bar:
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


def line_chart(ident: str, label: str, unit: str, lines: Sequence[Line]) -> str:
    """Curves over tokens, each named with its last value at its end.

    Args:
        ident: a prefix for the ids, unique on the page.
        label: what the chart is, for readers who do not see it; the values are added.
        unit: of the values.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            (
                _LEFT / WIDTH,
                _BOTTOM / _LINES_HEIGHT,
                (WIDTH - _LEFT - _RIGHT) / WIDTH,
                (_LINES_HEIGHT - _TOP - _BOTTOM) / _LINES_HEIGHT,
            )
        )
        _style(axes)
        for line in lines:
            tokens, values = _thinned(line.tokens, line.values)
            axes.plot(
                tokens,
                values,
                color=SENTINELS[line.colour],
                linewidth=1.6 if line.dashed else 2.0,
                linestyle=(0, (4, 2.5)) if line.dashed else "solid",
                marker="o" if line.dots or len(tokens) == 1 else None,
                markersize=3.6,
            )
        axes.margins(x=0.03, y=0.08)
        _name_ends(axes, lines)

    told = "; ".join(
        f"{line.name} from {line.values[0]:.3f} to {line.values[-1]:.3f} {unit}" for line in lines
    )
    return inline_svg(ident, f"{label}: {told}", _LINES_HEIGHT, draw)


def bar_chart(ident: str, label: str, bars: Sequence[Bar], colours: Mapping[str, str]) -> str:
    """Stacked horizontal bars of full width, each segment with its share where there is room.

    Args:
        colours: segment name to colour name, in the order of drawing.
    """
    height = len(bars) * (_LABEL + _BAR + _GAP) - _GAP + 2

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        for index, bar in enumerate(bars):
            _draw_bar(axes, bar, colours, index * (_LABEL + _BAR + _GAP))

    told = "; ".join(
        f"{bar.name}: "
        + ", ".join(f"{name} {percent(share)}" for name, share in _shares(bar, colours))
        for bar in bars
    )
    return inline_svg(ident, f"{label}. {told}", height, draw)


def _shares(bar: Bar, colours: Mapping[str, str]) -> list[tuple[str, float]]:
    total = sum(bar.amounts.get(name, 0) for name in colours)
    return [(name, bar.amounts.get(name, 0) / total if total else 0.0) for name in colours]


def _draw_bar(axes: Axes, bar: Bar, colours: Mapping[str, str], top: float) -> None:
    axes.text(0, top + 12, shortened(bar.name), fontsize=TEXT, color=SENTINELS["ink"])
    axes.text(WIDTH, top + 12, bar.note, fontsize=SMALL, color=SENTINELS["muted"], ha="right")
    left = 0.0
    for name, share in _shares(bar, colours):
        width = share * WIDTH
        if not width:
            continue
        axes.add_patch(
            Rectangle(
                (left, top + _LABEL),
                width,
                _BAR,
                facecolor=SENTINELS[colours[name]],
                edgecolor=SENTINELS["page"],
                linewidth=min(1.0, width / 3),
            )
        )
        if width >= _PIXELS_OF_A_SHARE:
            axes.text(
                left + width / 2,
                top + _LABEL + _BAR / 2 + 4,
                percent(share),
                fontsize=SMALL,
                color=SENTINELS[f"on-{colours[name]}"],
                ha="center",
            )
        left += width


def shortened(text: str, most: int = 28) -> str:
    """A text that fits beside a bar."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SENTINELS["rule"])
    axes.grid(axis="y", color=SENTINELS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(
        length=0, pad=6, labelsize=SMALL, labelcolor=SENTINELS["muted"], color=SENTINELS["rule"]
    )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set_xlabel("tokens", fontsize=SMALL, color=SENTINELS["muted"], labelpad=3)


def _name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name and last value beside its end, apart from each other."""
    transform = axes.transData
    axes.autoscale_view()
    ends = sorted(
        (float(transform.transform((line.tokens[-1], line.values[-1]))[1]), index)
        for index, line in enumerate(lines)
    )
    apart, previous = 14.0, -np.inf
    heights = []
    for height, _ in ends:
        previous = max(height, previous + apart)
        heights.append(previous)
    shift = (heights[-1] - ends[-1][0]) / 2  # half the push each way keeps labels near their lines
    for (_, index), height in zip(ends, heights, strict=True):
        line = lines[index]
        axes.annotate(
            f"{line.name} {line.values[-1]:.3f}",
            (WIDTH - _RIGHT + 3, height - shift),
            xycoords="figure pixels",
            annotation_clip=False,
            fontsize=SMALL,
            color=SENTINELS[line.colour],
            va="center_baseline",
        )


def _thinned(
    tokens: Sequence[float], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """At most `_MOST_POINTS` points, each the mean of as many neighbours."""
    if len(tokens) <= _MOST_POINTS:
        return tokens, values
    groups = _MOST_POINTS
    return (
        [float(part.mean()) for part in np.array_split(np.asarray(tokens), groups)],
        [float(part.mean()) for part in np.array_split(np.asarray(values), groups)],
    )


def inline_svg(ident: str, label: str, height: float, draw: Callable[[Figure], None]) -> str:
    """What `draw` draws on a figure of `WIDTH` by `height` units, in the colours of `SENTINELS`.

    Args:
        ident: a prefix for the ids, unique on the page.
        label: what the chart says, for readers who do not see it.
    """
    written = io.StringIO()
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": ident,
            "text.parse_math": False,
            "axes.unicode_minus": True,
            "font.family": ["sans-serif"],
            "font.sans-serif": ["DejaVu Sans"],
        }
    ):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(
            written,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inlined(written.getvalue(), ident, label, height)


def _inlined(svg: str, ident: str, label: str, height: float) -> str:
    """The drawing alone, with ids of its own and colours by CSS variable."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"(?<=\sid=\")|(?<=href=\"#)|(?<=url\(#)", f"{ident}-", body)
    body = re.sub(
        r"(?<=: )#[0-9a-f]{6}\b",
        lambda found: f"var(--{_NAMES[found[0]]})" if found[0] in _NAMES else found[0],
        body,
    )
    body = re.sub(r"font: (?:\d+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"{body.strip()}"
    )
