"""Whether memory of `casfs serve` grows with the number of calls: a million FindMissingBlobs, 32 in flight, by ghz."""

from __future__ import annotations

import random

from store.repository import Store
from tools.bench.load import Generator, get_generator
from tools.bench.measuring import Outcome, Settings
from tools.bench.server import CASFS, casfs_command, serving
from tools.bench.server_calls import fill, list_calls
from tools.bench.workers import Refused

_GROWN_MIB_MOST = 16.0


def run(settings: Settings) -> Outcome:
    """Without ghz there is nothing to measure."""
    outcome = Outcome()
    try:
        load = Generator(get_generator())
    except Refused as refused:
        outcome.notes.append(f"No load was put on the server: {refused}")
        return outcome
    generator = random.Random(0)  # noqa: S311 - bytes that can't be compressed
    place = settings.scratch / "store"
    with Store.open(place) as store:
        calls = list_calls(fill(store, generator), 1, generator)
    find = next(call for call in calls if call.what == "FindMissingBlobs(1)")
    warm, many = settings.size(20_000, 200), settings.size(1_000_000, 1000)
    with serving(casfs_command(place)) as server:
        load.run(server.address, find.method, find.data(warm), calls=warm, in_flight=32)
        before = server.memory()
        load.run(server.address, find.method, find.data(many), calls=many, in_flight=32)
        after = server.memory()
    outcome.add(f"memory after {warm:,} calls", CASFS, "MiB", before)
    outcome.add(f"memory after {warm + many:,} calls", CASFS, "MiB", after)
    outcome.aim("memory that many calls add", after - before, _GROWN_MIB_MOST, "MiB", at_most=True)
    return outcome
