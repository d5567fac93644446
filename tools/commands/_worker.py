"""The options of whoever runs actions; each is also a key under [worker]."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.projection import ENGINES
from store.errors import BadInput
from tools.commands import complete
from tools.config import PREFETCH, Settings
from tools.output import parse_duration, parse_size

if TYPE_CHECKING:
    from tools.worker.local import WorkerOptions


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """``--jobs`` and what belongs to it."""
    group = parser.add_argument_group("actions that are run")
    group.add_argument("--jobs", metavar="N", type=int, help="so many at a time (default: as many as cores)")
    group.add_argument(
        "--host-root",
        action="store_true",
        default=None,
        help="let them see the host's directories, read-only: its compilers; the property host-root=false refuses it",
    )
    group.add_argument(
        "--network", action="store_true", default=None, help="let those with the property network=true use the network"
    )
    group.add_argument(
        "--property",
        metavar="NAME=VALUE",
        action="append",
        help="a platform property that they may ask for, beside OSFamily and ISA; can be repeated",
    )
    group.add_argument("--action-timeout", metavar="DURATION", help="what each has at most (default: 1h)")
    group.add_argument("--action-memory", metavar="SIZE", help="what each has at most (default: its share of 90 %%)")
    group.add_argument(
        "--action-processes", metavar="N", type=int, help="processes and threads each has at most (default: 4096)"
    )
    complete(
        group.add_argument("--scratch", metavar="DIR", type=Path, help="where they write (default: beside the blobs)"),
        "directory",
    )
    group.add_argument("--engine", choices=ENGINES, help="what shows their input roots (default: auto)")
    group.add_argument(
        "--prefetch",
        choices=PREFETCH,
        help="which inputs to fetch before an action starts: profile: those that one like it opened before; "
        "the others come when they are opened (default: none)",
    )
    complete(
        group.add_argument(
            "--trace",
            metavar="DIR",
            type=Path,
            help="write down there what each uses of its inputs, in a file by its digest (see 'casfs trace report'); "
            "not with engine kernel",
        ),
        "directory",
    )
    complete(
        group.add_argument("--action-log", metavar="FILE", type=Path, help="append a line of JSON for each to it"),
        "file",
    )


def worker_options(args: argparse.Namespace, settings: Settings) -> WorkerOptions:
    """What command line and configuration say. Raises BadInput."""
    from tools.worker.local import WorkerOptions
    from tools.worker.task import Offer

    memory = settings.worker_memory if args.action_memory is None else parse_size(args.action_memory)
    longest = settings.worker_timeout if args.action_timeout is None else parse_duration(args.action_timeout)
    if longest < 1:
        raise BadInput(f"--action-timeout {args.action_timeout}: it is at least 1s")
    return WorkerOptions(
        jobs=_count(settings.worker_jobs if args.jobs is None else args.jobs, "--jobs", 1024, args.jobs is None),
        memory=memory,
        processes=_count(
            settings.worker_processes if args.action_processes is None else args.action_processes,
            "--action-processes",
            1 << 22,
        ),
        scratch=settings.worker_scratch if args.scratch is None else args.scratch,
        engine=settings.worker_engine if args.engine is None else args.engine,
        offer=Offer(
            host_root=settings.worker_host_root if args.host_root is None else args.host_root,
            network=settings.worker_network if args.network is None else args.network,
            properties=_properties(settings.worker_properties if args.property is None else args.property),
            longest=longest,
        ),
        prefetch=settings.worker_prefetch if args.prefetch is None else args.prefetch,
        trace=settings.worker_trace if args.trace is None else args.trace,
        action_log=settings.worker_action_log if args.action_log is None else args.action_log,
    )


def _count(number: int, option: str, most: int, zero: bool = False) -> int:
    if not (1 <= number <= most or (zero and not number)):
        raise BadInput(f"{option} {number}: it is from 1 to {most}")
    return number


def _properties(texts: tuple[str, ...] | list[str]) -> dict[str, frozenset[str]]:
    values: defaultdict[str, set[str]] = defaultdict(set)
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise BadInput(f"--property {text!r}: write NAME=VALUE")
        values[name].add(value)
    return {name: frozenset(known) for name, known in values.items()}
