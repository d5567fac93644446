"""What a person may want to see of the last hour: which action results came and went, and how often there was a hit.

Kept in memory, of this process; the samples are of all processes' lookups.
Actions that were run are noted by the threads that ran them.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
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


class Sample(NamedTuple):
    """Lookups within the `SAMPLE_SECONDS` before `when`."""

    when: float
    lookups: Lookups


class Recent:
    """Remembers a bounded number of events and samples. Used in the loop's thread."""

    def __init__(self, lookups: Callable[[], Lookups], now: Callable[[], float] = time.time) -> None:
        self._lookups = lookups
        self._now = now
        self._results: OrderedDict[tuple[str, Digest, bool], ResultEvent] = OrderedDict()
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
        key = (instance, action, opaque)
        before = self._results.pop(key, None)
        hits = (before.hits if before else 0) + (what == "hit")
        self._results[key] = ResultEvent(self._now(), instance, action, what, hits, opaque)
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
        # A copy in one go: the loop's thread may be adding to it.
        return list(self._results.values())[::-1]

    @property
    def samples(self) -> list[Sample]:
        """The oldest first."""
        return list(self._samples)
