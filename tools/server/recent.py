"""What a person may want to see of the last hour: which action results came and went, and how often there was a hit.

Kept in memory, of this process; the samples are of all processes' lookups.
Actions that were run are noted by the threads that ran them.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from store.digest import Digest
from tools.server.metrics import Lookups
from tools.worker.report import Report

SAMPLE_SECONDS = 10
_SAMPLES = 360
_RESULTS = 25
_ACTIONS = 50


class ResultEvent(NamedTuple):
    """What last happened to an action's result; `when` in seconds since the epoch.

    Of what is opaque the action's function and size aren't known, and mean nothing.
    """

    when: float
    instance: str
    action: Digest
    what: str
    hits: int
    opaque: bool


@dataclass(slots=True)
class _Noted:
    """As in `ResultEvent`."""

    when: float
    what: str
    hits: int


Named = tuple[str, Digest, bool]
"""An instance, an action, and whether its result is opaque."""


class Sample(NamedTuple):
    """Lookups within the `SAMPLE_SECONDS` before `when`."""

    when: float
    lookups: Lookups


class Recent:
    """Remembers a bounded number of events and samples. Used in the loop's thread."""

    def __init__(
        self,
        lookups: Callable[[], Lookups],
        now: Callable[[], float] = time.time,
        read: Callable[[bytes], Named | None] = lambda message: None,
    ) -> None:
        """`read` says what a message is about, None where it can't be told."""
        self._lookups = lookups
        self._now = now
        self._read = read
        self._results: OrderedDict[Named | bytes, _Noted] = OrderedDict()
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self._before = Lookups(0, 0)
        self._actions: deque[Report] = deque(maxlen=_ACTIONS)

    def note_action(self, report: Report) -> None:
        """An action was run, or couldn't be. From any thread."""
        self._actions.append(report)

    @property
    def actions(self) -> list[Report]:
        """The newest first."""
        return list(self._actions)[::-1]

    def find_action(self, action: Digest, instance: str) -> Report | None:
        """The last report of an action, if it isn't long ago."""
        return next((one for one in self.actions if (one.action, one.instance) == (action, instance)), None)

    def note(self, instance: str, action: Digest, what: str, *, opaque: bool = False) -> None:
        """An action's result was found ("hit") or stored."""
        self._note((instance, action, opaque), what)

    def note_message(self, message: bytes, what: str) -> None:
        """The same, of the action that a message names: a small one, as it is read when somebody looks."""
        self._note(message, what)

    def _note(self, key: Named | bytes, what: str) -> None:
        before = self._results.pop(key, None)
        hits = (before.hits if before else 0) + (what == "hit")
        self._results[key] = _Noted(self._now(), what, hits)
        if len(self._results) > _RESULTS:
            self._results.popitem(last=False)

    def sample(self) -> None:
        """Note what was looked up since the last time."""
        after = self._lookups()
        since = Lookups(after.hits - self._before.hits, after.misses - self._before.misses)
        self._samples.append(Sample(self._now(), since))
        self._before = after

    @property
    def results(self) -> list[ResultEvent]:
        """The newest first."""
        found: dict[Named, ResultEvent] = {}
        # A copy in one go: the loop's thread may be adding to it.
        for key, noted in list(self._results.items())[::-1]:
            named = self._read(key) if isinstance(key, bytes) else key
            if named is None:
                continue
            # Clients may ask for the same in other words.
            newer = found.get(named)
            if newer is not None:
                found[named] = newer._replace(hits=newer.hits + noted.hits)
            else:
                instance, action, opaque = named
                found[named] = ResultEvent(noted.when, instance, action, noted.what, noted.hits, opaque)
        return list(found.values())

    @property
    def samples(self) -> list[Sample]:
        """The oldest first."""
        return list(self._samples)
