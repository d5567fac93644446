"""A run's results as Markdown and as a value for JSON. No I/O."""

from __future__ import annotations

from typing import Any

from tools.bench.measuring import Aim, Measure, Outcome
from tools.bench.sessions import ProfiledFunction

FORMAT = 1
"""Of the JSON; raised when a reader would misunderstand the new one."""

_LEGEND = (
    "Each value is a median; the range is the lowest and the highest repetition. The ratio is to the first side of",
    "the same measure. Sides take turns within one run. The sides that come up again and again:",
    "",
    "- **host**: the files themselves, without casfs: native",
    "- **passthrough**: our own session, the kernel reads the blobs itself",
    "- **native**: our own session without passthrough: reads go through the daemon",
    "- **fuse**: the pyfuse3 session, for ordinary users",
    "- **kernel**: metadata layers and overlayfs, no process behind; as root unless it says *ordinary user*",
)


def as_json(machine: dict[str, str | int], command: str, results: dict[str, tuple[str, Outcome]]) -> dict[str, Any]:
    """`results`: scenario → what it is about, and its outcome."""
    return {
        "format": FORMAT,
        "command": command,
        "machine": machine,
        "scenarios": {name: {"about": about, **outcome.as_json()} for name, (about, outcome) in results.items()},
    }


def as_markdown(machine: dict[str, str | int], command: str, results: dict[str, tuple[str, Outcome]]) -> str:
    """The machine, the aims, and a table a scenario."""
    lines = ["# Benchmarks", "", f"Made by `{command}`.", ""]
    lines += _table(["machine", ""], [[name.replace("_", " "), str(value)] for name, value in machine.items()])
    lines += [
        "",
        *_LEGEND,
        "",
    ]
    aims = [aim for _, outcome in results.values() for aim in outcome.aims]
    if aims:
        lines += ["## Aims", "", *_table(["aim", "wanted", "found", ""], [_aim_row(aim) for aim in aims]), ""]
    for name, (about, outcome) in results.items():
        lines += [f"## {name}", "", about, ""]
        if outcome.measures:
            rows = [_measure_row(outcome, measure) for measure in _grouped(outcome)]
            lines += _table(["measure", "side", "median", "range", "runs", "ratio", "upcalls"], rows)
            lines.append("")
        lines += [f"- {note}" for note in outcome.notes]
        if outcome.notes:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def profile_as_text(name: str, calls: int, functions: list[ProfiledFunction], count: int = 16) -> str:
    """The most costly functions of one operation, in microseconds per operation."""
    lines = [f"{name}: {calls:,} operations, under cProfile", f"  {'own µs':>8} {'total µs':>9} {'calls':>6}  function"]
    for function in functions[:count]:
        own, total = function.own / calls * 1e6, function.total / calls * 1e6
        lines.append(f"  {own:8.2f} {total:9.2f} {function.calls / calls:6.1f}  {function.name}")
    return "\n".join(lines)


def _grouped(outcome: Outcome) -> list[Measure]:
    """The measures with all sides of one thing together, in the order in which things came up."""
    order = {what: number for number, what in reversed(list(enumerate(m.what for m in outcome.measures)))}
    return sorted(outcome.measures, key=lambda measure: order[measure.what])


def _measure_row(outcome: Outcome, measure: Measure) -> list[str]:
    yardstick = outcome.yardstick(measure)
    ratio = f"{measure.median / yardstick.median:.2f}" if measure is not yardstick and yardstick.median else ""
    counts = measure.upcalls or {}
    upcalls = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return [
        measure.what if measure is yardstick else "",
        measure.side,
        f"{number(measure.median)} {measure.unit}".strip(),
        f"{number(min(measure.values))} to {number(max(measure.values))}",
        str(len(measure.values)),
        ratio,
        upcalls or ("none" if measure.upcalls == {} and measure is not yardstick else ""),
    ]


def _aim_row(aim: Aim) -> list[str]:
    sign = "≤" if aim.at_most else "≥"
    return [
        aim.what,
        f"{sign} {number(aim.limit)} {aim.unit}".strip(),
        f"{number(aim.value)} {aim.unit}".strip(),
        "met" if aim.met else "**missed**",
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, its columns aligned so that it reads well as plain text too."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    return [
        "| " + " | ".join(lines[0]) + " |",
        "|" + "|".join("-" * (width + 2) for width in widths) + "|",
        *("| " + " | ".join(line) + " |" for line in lines[1:]),
    ]


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}".rstrip("0").rstrip(".")
