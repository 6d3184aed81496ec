"""Charts as inline SVG. XML elements escape all texts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from markupsafe import Markup

COLOURS = 6
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
SHIFT = 5
"""Distance of points of several lines at one iterate, so that their whiskers do not lie on each other."""
LANE = 24
GANTT_WIDTH, GANTT_LEFT = 960, 170
MOST_NAMES = 9
MOST_POINTS = 300
"""Most points of a line. More are averaged in bins."""
Place = Callable[[float], float]
"""Function from a value to view box units."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    intervals: Sequence[tuple[float, float] | None] = ()
    """(low, high) of each point."""
    joined: bool = True
    """False draws points without a line between them."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time in a Gantt chart."""

    lane: str
    start: float
    end: float
    colour: int
    title: str
    broken: bool = False
    """True if the attempt failed or was lost."""
    useful: float | None = None
    """Fraction of useful work, drawn as a stripe."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    x_names: Sequence[str] | None = None,
    baseline: tuple[float, str] | None = None,
) -> Markup:
    """Draws lines. ``x_names`` label x = 0, 1, …; the ``baseline`` is drawn if near."""
    series = [_thinned(line) for line in series]
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    ys += [end for line in series for interval in line.intervals if interval for end in interval]
    if baseline and ys and min(ys) - _spread(ys) <= baseline[0] <= max(ys) + _spread(ys):
        ys.append(baseline[0])
    low, high, ticks = _scale(ys)
    x_low, x_high = min(xs, default=0), max(xs, default=1)
    places = [(tick, _short(tick)) for tick in _ticks(x_low, x_high, whole=True)]
    if x_names:
        places = [(x, x_names[int(x)]) for x in sorted(set(xs))]
        x_low, x_high = x_low - 0.3, x_high + 0.3
    x_high = x_high if x_high > x_low else x_low + 1

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    svg = _svg(WIDTH, HEIGHT, f"{title}: " + "; ".join(_spoken(line) for line in series), "chart")
    for tick in ticks:
        _add(svg, "line", "grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y_at(tick), y2=y_at(tick))
        _text(svg, LEFT - 6, y_at(tick) + 4, _short(tick), "end")
    for place, name in places[:: math.ceil(len(places) / MOST_NAMES)]:
        _text(svg, x_at(place), HEIGHT - BOTTOM + 16, name, "middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "middle")
    if baseline and low <= baseline[0] <= high:
        _add(svg, "line", "baseline", x1=LEFT, x2=WIDTH - RIGHT, y1=y_at(baseline[0]), y2=y_at(baseline[0]))
        _text(svg, WIDTH - RIGHT, y_at(baseline[0]) - 4, baseline[1], "end")
    for place, line in enumerate(series):
        aside = SHIFT * (place - (len(series) - 1) / 2) if x_names else 0.0
        _draw(svg, line, lambda x, aside=aside: x_at(x) + aside, y_at, x_names)
    return _markup(svg)


def gantt(bars: Sequence[Bar]) -> Markup:
    if not bars:
        return Markup("")
    lanes = list(dict.fromkeys(bar.lane for bar in bars))
    start, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    span = max(end - start, 1e-9)
    unit, seconds = ("h", 3600) if span > 7200 else ("min", 60) if span > 120 else ("s", 1)
    height = len(lanes) * LANE + BOTTOM
    svg = _svg(GANTT_WIDTH, height, f"Stages over {span / seconds:.1f} {unit} of wall time", "gantt")

    def x_at(time: float) -> float:
        return GANTT_LEFT + (time - start) / span * (GANTT_WIDTH - GANTT_LEFT - RIGHT)

    for tick in _ticks(0, span / seconds, whole=False):
        x = x_at(start + tick * seconds)
        _add(svg, "line", "grid", x1=x, x2=x, y1=0, y2=height - BOTTOM)
        _text(svg, x, height - BOTTOM + 16, f"{_short(tick)} {unit}", "middle")
    for number, lane in enumerate(lanes):
        _text(svg, GANTT_LEFT - 8, number * LANE + LANE * 0.68, lane, "end")
    for bar in bars:
        mark = _add(
            svg, "rect", f"bar s{bar.colour % COLOURS}" + (" broken" if bar.broken else ""),
            x=x_at(bar.start), y=lanes.index(bar.lane) * LANE + 3, width=max(x_at(bar.end) - x_at(bar.start), 2),
            height=LANE - 6, rx=2,
        )  # fmt: skip
        _title(mark, bar.title)
        if bar.useful is not None:
            width = (x_at(bar.end) - x_at(bar.start)) * min(bar.useful, 1.0)
            y = lanes.index(bar.lane) * LANE + LANE - 8
            stripe = _add(svg, "rect", "useful", x=x_at(bar.start), y=y, width=width, height=3)
            _title(stripe, bar.title)
    return _markup(svg)


def _draw(svg: ElementTree.Element, line: Series, x_at: Place, y_at: Place, x_names: Sequence[str] | None) -> None:
    kind = f"s{line.colour % COLOURS}"
    path = " ".join(f"{'L' if i else 'M'}{x_at(x):.1f},{y_at(y):.1f}" for i, (x, y) in enumerate(line.points))
    if path and line.joined:
        _title(_add(svg, "path", f"line {kind}", d=path), line.name)
    for (x, _), interval in zip(line.points, line.intervals, strict=False):
        if interval:
            _add(svg, "line", f"whisker {kind}", x1=x_at(x), x2=x_at(x), y1=y_at(interval[0]), y2=y_at(interval[1]))
    if len(line.points) <= 40:
        for x, y in line.points:
            dot = _add(svg, "circle", f"dot {kind}", cx=x_at(x), cy=y_at(y), r=3 if x_names else 2.2)
            _title(dot, f"{line.name}, {x_names[int(x)] if x_names else _short(x)}: {y:.4g}")


def _thinned(line: Series) -> Series:
    points = [(x, y) for x, y in line.points if math.isfinite(y)]
    if len(points) <= MOST_POINTS:
        return line if len(points) == len(line.points) else replace(line, points=points, intervals=())
    size = math.ceil(len(points) / MOST_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]
    return replace(line, points=means, intervals=())


def _spoken(line: Series) -> str:
    """Describes a line for screen readers."""
    if not line.points:
        return f"{line.name} empty"
    ys = [y for _, y in line.points]
    said = f"{line.name} from {ys[0]:.3g} to {ys[-1]:.3g}"
    said += f", lowest {min(ys):.3g}" if min(ys) < min(ys[0], ys[-1]) else ""
    return said + (f", highest {max(ys):.3g}" if max(ys) > max(ys[0], ys[-1]) else "")


def _spread(ys: Sequence[float]) -> float:
    return max(max(ys) - min(ys), 1e-3)


def _scale(ys: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    if high - low < 1e-9 * max(abs(high), 1):
        low, high = low - max(abs(low) * 0.1, 0.1), high + max(abs(high) * 0.1, 0.1)
    step = _step(low, high)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    step = max(_step(low, high), 1) if whole else _step(low, high)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, for at most five steps."""
    rough = max(high - low, 1e-12) / 5
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)


def _short(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.5g}"


def _svg(width: float, height: float, label: str, kind: str) -> ElementTree.Element:
    return ElementTree.Element(
        "svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class": kind}
    )


def _add(parent: ElementTree.Element, tag: str, kind: str, **attributes: float | str) -> ElementTree.Element:
    shown = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": kind, **shown})


def _text(parent: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    _add(parent, "text", anchor, x=x, y=y).text = text


def _title(parent: ElementTree.Element, text: str) -> None:
    ElementTree.SubElement(parent, "title").text = text


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
