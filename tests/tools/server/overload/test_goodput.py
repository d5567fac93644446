"""More is wanted than the server can do: it goes on doing what it can, and most of that is of use to somebody."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from store.repository import Store
from tests.tools.server.overload.bazel import Asker
from tests.tools.server.overload.paced_server import BOUNDS, COSTS, Costs
from tests.tools.server.overload.scenario import CALM_SECONDS, CONNECTIONS, PATIENCE, full_rate, overload, world
from tests.tools.server.overload.virtual_time import VirtualLoop, run_virtually

SLOW_DISK = Costs(begin=0.002, write=0.001, take=0.001, settle=0.001, sync=0.5, blob=0.015)
"""What limits is a disk that takes half a second for a sync."""
OWN_CALLS = 4 + 4096 // 300
"""What a connection may have waiting whatever there is, and a parse more than that (`Load`, `ConnectionCalls`)."""

READ_BYTES = 128 << 10
"""What of a connection may be read and not yet parsed: it is read while that is less than 64 KiB, as much at a time."""


@lru_cache(None)
def most(costs: Costs) -> float:
    """Uploads a second."""
    with TemporaryDirectory() as directory, Store.open(Path(directory) / "store") as store:
        return full_rate(store, costs)


@pytest.mark.parametrize("costs", [COSTS, SLOW_DISK], ids=["slow loop", "slow disk"])
@pytest.mark.parametrize("load", [0.5, 1, 2, 5, pytest.param(20, marks=pytest.mark.long)])
def test_as_much_is_stored_as_can_be_whatever_is_wanted(store: Store, load: float, costs: Costs) -> None:
    count = int(load * PATIENCE.deadline * most(costs))
    outcome = overload(store, count, seconds=8 * PATIENCE.deadline, costs=costs)
    assert outcome.rate >= 0.8 * most(costs)
    assert max(outcome.calm) <= CALM_SECONDS
    assert outcome.peak.calls <= BOUNDS.calls + (CONNECTIONS + 1) * OWN_CALLS
    assert outcome.peak.bytes <= BOUNDS.bytes + (CONNECTIONS + 1) * (64 << 10)
    assert outcome.peak.unparsed <= (CONNECTIONS + 1) * READ_BYTES


@pytest.mark.parametrize(
    "load",
    [
        0.5,
        1,
        2,
        # What is begun at 5 is what had waited longest at its client, and so is nearly over.
        pytest.param(
            5, marks=(pytest.mark.long, pytest.mark.xfail(reason="clients send first what they give up first"))
        ),
    ],
)
def test_questions_are_answered_in_time(store: Store, load: float) -> None:
    """All the while so many are waiting that there is no end of retries, of which each is as dear as the first."""
    rate = 1 / (2 * COSTS.frame + COSTS.begin)

    async def main(loop: VirtualLoop) -> float:
        async with world(store, loop) as here:
            asker = Asker(loop, [here.connect() for _ in range(CONNECTIONS)], PATIENCE)
            await asker.ask_on(int(load * PATIENCE.deadline * rate), 8 * PATIENCE.deadline)
            assert max(here.calm.latencies) <= CALM_SECONDS
            return asker.answered / (8 * PATIENCE.deadline)

    assert run_virtually(main) >= 0.7 * rate
