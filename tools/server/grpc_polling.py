"""How grpcio waits for its connections: said before it is imported, in the environment.

With its event engine, as it comes, what arrives is read by one of the engine's
threads, which wakes the thread of the completion queue, which wakes the event
loop. Without it the queue's thread reads by itself, as it always did before
grpcio 1.80: one thread and its wake-ups less for each step of a call.
"""

from __future__ import annotations

import os

ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_listener"}
"""Of a process that serves. A grpcio that no longer knows the name logs that, and does as it likes."""


def poll_by_the_queue() -> None:
    """Have servers of this process go without the event engine, unless whoever started it has decided otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
