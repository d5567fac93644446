"""Values of a benchmark: samples collected by what was measured and on which side, medians, spreads, aims.

No I/O. Single-threaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Measure:
    """One line of a table: every repetition's value, in `unit`, of one thing on one side."""

    what: str
    side: str
    unit: str
    values: list[float] = field(default_factory=list)
    upcalls: dict[str, int] | None = None
    """By opcode, of the last repetition: counts, unlike times, are the same each time."""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure the project wants to reach: `value` at most, or at least, `limit`."""

    what: str
    value: float
    limit: float
    unit: str
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(slots=True)
class Outcome:
    """What a scenario found. Sides of one measure come in the order they are added; the first is the yardstick."""

    measures: list[Measure] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, side: str, unit: str, value: float, upcalls: dict[str, int] | None = None) -> None:
        """One repetition's value."""
        measure = self.find(what, side)
        if measure is None:
            measure = Measure(what, side, unit)
            self.measures.append(measure)
        measure.values.append(value)
        measure.upcalls = upcalls

    def find(self, what: str, side: str) -> Measure | None:
        """The measure of that name on that side, or None."""
        return next((m for m in self.measures if m.what == what and m.side == side), None)

    def median(self, what: str, side: str) -> float:
        """The median of a measure that was taken. Raises KeyError."""
        measure = self.find(what, side)
        if measure is None:
            raise KeyError(f"{what}, {side}")
        return measure.median

    def aim(self, what: str, value: float, limit: float, unit: str, *, at_most: bool) -> None:
        """Compare a value with what the project wants."""
        self.aims.append(Aim(what, value, limit, unit, at_most))

    def yardstick(self, measure: Measure) -> Measure:
        """The first side of the same thing."""
        return next(m for m in self.measures if m.what == measure.what)

    def as_json(self) -> dict[str, Any]:
        """For `json.dump`."""
        return {
            "measures": [
                {
                    "what": m.what,
                    "side": m.side,
                    "unit": m.unit,
                    "median": m.median,
                    "lowest": min(m.values),
                    "highest": max(m.values),
                    "ratio": _ratio(m.median, self.yardstick(m).median),
                    "values": m.values,
                    "upcalls": m.upcalls,
                }
                for m in self.measures
            ],
            "aims": [
                {
                    "what": a.what,
                    "value": a.value,
                    "limit": a.limit,
                    "unit": a.unit,
                    "at_most": a.at_most,
                    "met": a.met,
                }
                for a in self.aims
            ],
            "notes": self.notes,
        }


def _ratio(value: float, yardstick: float) -> float | None:
    return value / yardstick if yardstick else None


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What the scenarios of many clients were asked for in place of their own numbers."""

    clients: int | None = None
    files: int | None = None
    core_percent: int | None = None
    """Of one core: what the server may use."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run was asked for: `repeat` overrides a scenario's own number of repetitions."""

    scratch: Path
    quick: bool = False
    repeat: int | None = None
    fleet: FleetSettings = FleetSettings()

    def rounds(self, usual: int) -> int:
        """How often to repeat what the scenario repeats `usual` times."""
        return self.repeat or (1 if self.quick else usual)

    def size(self, full: int, quick: int) -> int:
        """How much to do of something."""
        return quick if self.quick else full


def alternate(sides: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and side: each side once a round, every other round backwards, so that a drift hits all alike."""
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side
