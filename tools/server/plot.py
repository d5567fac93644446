"""The hit rate over time as SVG: a column a minute, and the rate as a line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from tools.server.markup import Markup, join, tag
from tools.server.recent import Sample

_MINUTES = 60
_WIDTH, _HEIGHT = 720, 184
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 712, 18, 150
_STEP = (_RIGHT - _LEFT) / _MINUTES


class Minute(NamedTuple):
    """Lookups within a minute; `ago` in minutes."""

    ago: int
    hits: float
    misses: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.hits + self.misses


def by_minute(samples: Sequence[Sample], now: float) -> list[Minute]:
    """The minutes of the last hour in which something was looked up, the oldest first."""
    sums: dict[int, list[float]] = {}
    for sample in samples:
        ago = int(max(now - sample.when, 0) // 60)
        if ago < _MINUTES and any(sample.lookups):
            both = sums.setdefault(ago, [0.0, 0.0])
            both[0] += sample.lookups.hits
            both[1] += sample.lookups.misses
    return [Minute(ago, *sums[ago]) for ago in sorted(sums, reverse=True)]


def draw(minutes: Sequence[Minute]) -> Markup:
    """The picture."""
    most = max((minute.total for minute in minutes), default=1.0)
    label = "Lookups in each minute of the last hour, those that were hits, and the hit rate"
    return tag(
        "svg",
        tag("title", label),
        _grid(most),
        [_column(minute, most) for minute in minutes],
        _line(minutes),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
    )


def _x(minute: Minute) -> float:
    return round(_RIGHT - (minute.ago + 1) * _STEP, 1)


def _y(part: float) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * part, 1)


def _grid(most: float) -> Markup:
    lines = [
        join(
            tag("line", x1=_LEFT, x2=_RIGHT, y1=_y(part), y2=_y(part), class_="grid"),
            tag("text", f"{part:.0%}", x=_LEFT - 6, y=_y(part) + 5, text_anchor="end"),
        )
        for part in (0.0, 0.5, 1.0)
    ]
    ends = (
        tag("text", "an hour ago", x=_LEFT, y=_BOTTOM + 25),
        tag(
            "text",
            f"highest column: {most:,.0f} lookups a minute",
            x=(_LEFT + _RIGHT) // 2,
            y=_BOTTOM + 25,
            text_anchor="middle",
            class_="most",
        ),
        tag("text", time.strftime("now, %H:%M"), x=_RIGHT, y=_BOTTOM + 25, text_anchor="end"),
    )
    return join(lines, ends)


def _column(minute: Minute, most: float) -> Markup:
    hits, all_ = _y(minute.hits / most), _y(minute.total / most)
    x, width = _x(minute) + 1, round(_STEP - 2, 1)
    return join(
        tag("rect", x=x, y=all_, width=width, height=round(hits - all_, 1), class_="miss"),
        tag("rect", x=x, y=hits, width=width, height=round(_BOTTOM - hits, 1), class_="hit"),
    )


def _line(minutes: Sequence[Minute]) -> Markup:
    points = [(round(_x(minute) + _STEP / 2, 1), _y(minute.hits / minute.total)) for minute in minutes]
    path = " ".join(f"{x},{y}" for x, y in points)
    return join(
        tag("polyline", points=path, class_="rate") if points else None,
        [tag("circle", cx=x, cy=y, r=3, class_="rate") for x, y in points],
    )
