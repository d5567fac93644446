"""The picture for the README: bars of what a compilation takes, drawn from the results as JSON. No I/O.

Plain SVG with a style sheet of its own, readable on light and on dark ground.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

_SCENARIO = "compile"
_WALL, _READING = "compile and link, wall", "preprocess only, wall"
_SIDES = {
    "host": "host, without casfs",
    "passthrough": "casfs, passthrough",
    "native": "casfs, no passthrough",
    "fuse": "casfs, pyfuse3",
}
_OPCODES = ("READ", "LOOKUP", "OPEN", "RELEASE")
"""Each with a colour of its own, READ first: where it is 0 the eye shall see it."""

_WIDTH, _LEFT, _RIGHT = 760, 168, 152
_BAR, _STEP, _HEAD = 16, 24, 34
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.head { font-weight: 600; }
.small { font-size: 11px; fill: #57606a; }
.ground { fill: #ffffff; }
.host { fill: #8c959f; } .casfs { fill: #4477aa; }
.READ { fill: #cc3311; } .LOOKUP { fill: #4477aa; } .OPEN { fill: #228833; } .RELEASE { fill: #bbaa33; }
.others { fill: #8c959f; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .small { fill: #9da7b1; }
  .ground { fill: #0d1117; }
  .casfs, .LOOKUP { fill: #6699cc; } .READ { fill: #ee6677; } .OPEN { fill: #44aa66; } .RELEASE { fill: #ccbb44; }
}
"""


def as_svg(results: dict[str, Any]) -> str | None:
    """`results` as `tools.bench.report.as_json` gives them; None where nothing was compiled."""
    measures = results["scenarios"].get(_SCENARIO, {}).get("measures", [])
    by_name: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        if measure["side"] in _SIDES:
            by_name.setdefault(measure["what"], []).append(measure)
    chart = _Chart()
    if _WALL in by_name:
        chart.add_times("A C++ program that includes hundreds of headers, compiled on a fresh mount", by_name[_WALL])
    if _READING in by_name:
        chart.add_times("The same, reading the headers alone (g++ -E)", by_name[_READING])
    counted = by_name.get(_WALL) or by_name.get(_READING)
    if counted is None:
        return None
    chart.add_upcalls("Upcalls on the way", [measure for measure in counted if measure["upcalls"]])
    machine = results["machine"]
    return chart.finish(f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}; medians; lower is better")


class _Chart:
    """Rows of bars, from the top down."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._y = 8

    def add_times(self, title: str, measures: list[dict[str, Any]]) -> None:
        """A bar a side; values in seconds."""
        self._title(title)
        scale = self._room / max(measure["median"] for measure in measures)
        for measure in measures:
            kind = "host" if measure["side"] == "host" else "casfs"
            length = measure["median"] * scale
            self._bar(_LEFT, length, kind)
            ratio = "" if measure["side"] == "host" or not measure["ratio"] else f" (ratio {measure['ratio']:.2f})"
            self._row(_SIDES[measure["side"]], f"{_seconds(measure['median'])}{ratio}", length)

    def add_upcalls(self, title: str, measures: list[dict[str, Any]]) -> None:
        """A bar a side, divided by opcode."""
        if not measures:
            return
        self._title(title)
        scale = self._room / max(sum(measure["upcalls"].values()) for measure in measures)
        for measure in measures:
            counts = dict(measure["upcalls"])
            parts = {name: counts.pop(name, 0) for name in _OPCODES} | {"others": sum(counts.values())}
            x = float(_LEFT)
            for name, count in parts.items():
                self._bar(x, count * scale, name)
                x += count * scale
            self._row(_SIDES[measure["side"]], f"{sum(parts.values()):,} (READ {parts['READ']:,})", x - _LEFT)
        self._legend((*_OPCODES, "others"))

    @property
    def _room(self) -> int:
        return _WIDTH - _LEFT - _RIGHT

    def _title(self, text: str) -> None:
        self._y += _HEAD
        self._text(12, self._y - 12, text, "head")

    def _row(self, name: str, value: str, length: float) -> None:
        self._text(12, self._y + _BAR - 4, name)
        self._text(_LEFT + length + 6, self._y + _BAR - 4, value)
        self._y += _STEP

    def _legend(self, names: tuple[str, ...]) -> None:
        for number, name in enumerate(names):
            x = _LEFT + number * 84
            self._parts.append(f'<rect x="{x}" y="{self._y + 4}" width="10" height="10" class="{name}"/>')
            self._text(x + 14, self._y + 13, name, "small")
        self._y += _STEP

    def _bar(self, x: float, length: float, kind: str) -> None:
        if length:
            self._parts.append(f'<rect x="{x:.1f}" y="{self._y}" width="{length:.1f}" height="{_BAR}" class="{kind}"/>')

    def _text(self, x: float, y: float, text: str, kind: str = "") -> None:
        style = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x:.1f}" y="{y}"{style}>{escape(text)}</text>')

    def finish(self, foot: str) -> str:
        """The whole picture."""
        self._y += 18
        self._text(12, self._y, foot, "small")
        size = f'width="{_WIDTH}" height="{self._y + 12}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            "<title>What a compilation out of a mount takes</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="ground" {size} rx="6"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
