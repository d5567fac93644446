"""``casfs worker``: run the actions of a cluster."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import BadInput
from store.quota import Limits
from tools.commands import complete
from tools.commands._upstream import add_upstream_arguments, apply_upstream
from tools.commands._worker import add_worker_arguments, worker_options
from tools.config import Settings
from tools.output import parse_size

if TYPE_CHECKING:
    from tools.cluster.joining import Member
    from tools.cluster.working import ClusterOptions
    from tools.upstream.options import UpstreamOptions
    from tools.worker.local import WorkerOptions

EXAMPLES = """\
casfs worker --buildgrid grpc://build.example:50051 --host-root
casfs worker --buildgrid grpcs://build.example/main --token worker.token --jobs 8
casfs worker --buildbarn grpc://scheduler:8983 --upstream grpc://storage:8980
"""

EXITS = """
  0  after SIGTERM or Ctrl-C: what ran is finished, or, after a second one, given back
  2  the command or its input is wrong
  4  the store can't be used, or was deleted or replaced: what ran is given back
  5  this machine or user lacks what sandboxes need
  6  something hung: it ended itself 23 s after its last action, or after the second signal
130  after a third Ctrl-C, 143 after a third SIGTERM: at once, actions included
142  as 6, where not even that was possible (SIGALRM; a second later)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments. Each is also a key under [worker]."""
    which = parser.add_argument_group("the cluster").add_mutually_exclusive_group()
    which.add_argument(
        "--buildgrid",
        metavar="URL",
        help="work for this BuildGrid: grpc://HOST[:PORT][/INSTANCE], or grpcs:// for TLS; "
        "inputs come from there, too, and outputs go there, unless --upstream says where else",
    )
    which.add_argument(
        "--buildbarn",
        metavar="URL",
        help="work for this Buildbarn scheduler; its storage is --upstream, and --property has to be exactly what "
        "its actions ask for",
    )
    parser.add_argument(
        "--name", help="what the scheduler knows this worker by; no other may have it (default: host and process)"
    )
    parser.add_argument("--size-class", metavar="N", type=int, help="how large this worker is, for Buildbarn")
    for name, text in (
        ("--token", "a file with a bearer token for the scheduler"),
        ("--tls-ca", "a PEM file: the authority of the scheduler's certificate (default: gRPC's own list)"),
        ("--tls-certificate", "a PEM file: our certificate for the scheduler"),
        ("--tls-key", "a PEM file: our certificate's key"),
    ):
        complete(parser.add_argument(name, metavar="FILE", type=Path, help=text), "file")
    parser.add_argument(
        "--http-listen",
        metavar="HOST:PORT",
        help="show numbers for Prometheus at http://HOST:PORT/metrics, to whoever can connect (default: nowhere)",
    )
    parser.add_argument(
        "--insecure", action="store_true", default=None, help="show them in plain text to other machines, too"
    )
    parser.add_argument(
        "--max-size", metavar="SIZE", help="keep the store below it: what was not used for longest goes"
    )
    add_upstream_arguments(parser)
    add_worker_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Work until SIGTERM or Ctrl-C; what runs then is finished, unless there comes another. See EXITS."""
    settings = apply_upstream(args, settings)
    options = _options(args, settings)
    from tools.cluster.working import work

    return work(options)


def _options(args: argparse.Namespace, settings: Settings) -> ClusterOptions:
    scheduler, buildbarn = _scheduler(args, settings)
    upstream = settings.upstream
    if upstream is None:
        if buildbarn:
            raise BadInput("--buildbarn needs --upstream: a Buildbarn's storage has an address of its own")
        upstream = scheduler
    worker = worker_options(args, settings)
    from tools.cluster.working import ClusterOptions
    from tools.server.address import Address, check_plain
    from tools.server.services import ServiceOptions

    http_listen = args.http_listen or settings.worker_http_listen
    http_address = Address.parse(http_listen) if http_listen else None
    if http_address is not None and not (settings.worker_insecure if args.insecure is None else args.insecure):
        check_plain(http_address)
    max_size = settings.serve_max_size if args.max_size is None else parse_size(args.max_size)
    return ClusterOptions(
        store=settings.store,
        scheduler=scheduler,
        upstream=upstream,
        member=_member(args, settings, worker, exactly=buildbarn),
        buildbarn=buildbarn,
        worker=worker,
        services=ServiceOptions(limits=None if not max_size else Limits.below(max_size, settings.serve_grace)),
        sources=settings.local_sources,
        http_address=http_address,
        announce=lambda text: print(text, flush=True),
    )


def _scheduler(args: argparse.Namespace, settings: Settings) -> tuple[UpstreamOptions, bool]:
    """Where it is, and whether it is a Buildbarn. Raises BadInput."""
    if args.buildgrid is not None or args.buildbarn is not None:
        settings = settings._replace(worker_buildgrid=args.buildgrid, worker_buildbarn=args.buildbarn)
    urls = (settings.worker_buildgrid, settings.worker_buildbarn)
    if urls[0] is not None and urls[1] is not None:
        raise BadInput("a worker works for one scheduler: give a buildgrid or a buildbarn in [worker], not both")
    url = urls[0] or urls[1]
    if not url:
        raise BadInput(
            "for whom? give --buildgrid URL or --buildbarn URL; 'casfs serve --execute' needs no other scheduler"
        )
    from tools.upstream.options import UpstreamOptions

    files = (
        args.token or settings.worker_token,
        args.tls_ca or settings.worker_tls_ca,
        args.tls_certificate or settings.worker_tls_certificate,
        args.tls_key or settings.worker_tls_key,
    )
    options = UpstreamOptions(url, *(None if file is None else str(file.absolute()) for file in files))
    options.check()
    return options, urls[1] is not None


def _member(args: argparse.Namespace, settings: Settings, worker: WorkerOptions, *, exactly: bool) -> Member:
    """What the scheduler is told; `exactly`: no properties but those that were given."""
    from tools.cluster.joining import Member
    from tools.worker.task import machine_names

    offered = [(name, value) for name, values in worker.offer.properties.items() for value in sorted(values)]
    if not exactly:
        offered += [("OSFamily", "linux"), *(("ISA", name) for name in machine_names())]
    size_class = settings.worker_size_class if args.size_class is None else args.size_class
    if not 0 <= size_class < 1 << 32:
        raise BadInput(f"--size-class {size_class}: it is a small number, and not negative")
    name = args.name or settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
    return Member(name, worker.slots, tuple(dict.fromkeys(offered)), size_class)
