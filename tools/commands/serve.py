"""``casfs serve``: the store as a remote cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from store.errors import BadInput
from store.quota import Limits
from tools.commands import complete
from tools.commands._upstream import add_upstream_arguments, apply_upstream
from tools.commands._worker import add_worker_arguments, worker_options
from tools.config import LOG_LEVELS, Settings
from tools.output import parse_duration, parse_size

if TYPE_CHECKING:
    from tools.server.serve import ServeOptions
    from tools.server.tls import TlsFiles

T = TypeVar("T")

EXAMPLES = """
casfs serve                                       # for this machine: grpc://127.0.0.1:8980
casfs serve --max-size 50GiB --processes 2
casfs serve --http-listen 127.0.0.1:8080           # http:// too, for ccache and for a browser
casfs serve --listen :8980 --tls-certificate server.crt --tls-key server.key --tokens tokens
casfs serve --execute --host-root                 # runs actions, too, with the host's compilers
casfs serve --upstream grpcs://cache.example/main --write-back
bazel build --remote_cache=grpc://127.0.0.1:8980 //...
"""

EXITS = """
  0  after SIGTERM or Ctrl-C: calls have ended, or were broken off after --drain-timeout
  1  a process of several ended by itself
  2  the command or its input is wrong
  4  the store can't be used, or was deleted or replaced, which is noticed within seconds
  6  a call, thread or disk hung: the server ended itself 3 s after --drain-timeout
130  after a second Ctrl-C, 143 after a second SIGTERM: at once
142  as 6, where not even that was possible (SIGALRM; a second later)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs serve`` takes; each is also a key under [serve] of the configuration."""
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="where to listen; port 0 takes a free one (default: 127.0.0.1:8980)"
    )
    parser.add_argument(
        "--http-listen", metavar="HOST:PORT", help="where to listen for HTTP, too, and show pages (default: nowhere)"
    )
    parser.add_argument(
        "--http-validate-ac",
        action="store_true",
        default=None,
        help="over HTTP, take only ActionResults, and answer with whole ones; else whatever comes (as ccache needs it)",
    )
    parser.add_argument(
        "--http-name",
        metavar="NAME",
        action="append",
        help="a name that clients use for this server in URLs; can be repeated "
        "(default: localhost if only this machine can reach it, else any)",
    )
    parser.add_argument("--max-body", metavar="SIZE", help="bytes of one HTTP upload, expanded (default: 16GiB)")
    parser.add_argument(
        "--instance",
        metavar="NAME",
        action="append",
        help="serve only instances named so; can be repeated (default: serve every one)",
    )
    parser.add_argument("--processes", metavar="N", type=int, help="share the port among so many (default: 1)")
    parser.add_argument("--read-only", action="store_true", default=None, help="write nothing for any client")
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="how large the store may get: above nine tenths, what was not used for longest goes (default: no limit)",
    )
    parser.add_argument("--grace", metavar="DURATION", help="what was used within it doesn't go (default: 60s)")
    for name, text in (
        ("--tls-certificate", "a PEM file: serve TLS with this certificate"),
        ("--tls-key", "a PEM file: the certificate's key"),
        ("--tls-client-ca", "a PEM file: let in who has a certificate of this authority"),
        ("--tokens", "a file of bearer tokens, lines 'read TOKEN' or 'write TOKEN'"),
    ):
        complete(parser.add_argument(name, metavar="FILE", type=Path, help=text), "file")
    add_upstream_arguments(parser)
    parser.add_argument(
        "--write-back",
        action="store_true",
        default=None,
        help="what clients upload goes to the upstream, too, in the background",
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        default=None,
        help="run actions, too, each in a sandbox that has its input root and nothing else",
    )
    add_worker_arguments(parser)
    parser.add_argument("--insecure", action="store_true", default=None, help="serve plain text to other machines, too")
    parser.add_argument("--max-message", metavar="SIZE", help="bytes of one message (default: 16MiB)")
    parser.add_argument("--max-streams", metavar="N", type=int, help="calls at a time of a connection (default: 1000)")
    parser.add_argument(
        "--max-uploads", metavar="N", type=int, help="large uploads that are taken at a time; others wait (default: 64)"
    )
    parser.add_argument(
        "--idle-timeout", metavar="DURATION", help="end a stream without progress for so long (default: 60s)"
    )
    parser.add_argument(
        "--drain-timeout",
        metavar="DURATION",
        help="at SIGTERM or Ctrl-C, let calls that are on end within so long; a second one ends it at once "
        "(default: 20s)",
    )
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        help="what is written to the store's casfs.log; debug: also each call that makes no progress for 10 s "
        "(default: info)",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C. The codes are those of EXITS."""
    try:
        import google.protobuf  # noqa: F401 - the processes import what they need after they were forked
    except ImportError as error:
        raise BadInput("serving needs packages that aren't installed here: pip install 'casfs[serve]'") from error
    from tools.server.serve import serve

    return serve(_options(args, apply_upstream(args, settings)))


def _options(args: argparse.Namespace, settings: Settings) -> ServeOptions:
    from tools.server.address import Address
    from tools.server.serve import HttpOptions, ServeOptions
    from tools.server.services import ServiceOptions

    http_listen = _either(args.http_listen, settings.serve_http_listen)
    max_size = settings.serve_max_size if args.max_size is None else parse_size(args.max_size)
    grace = settings.serve_grace if args.grace is None else parse_duration(args.grace)
    message = settings.serve_max_message if args.max_message is None else parse_size(args.max_message)
    return ServeOptions(
        store=settings.store,
        address=Address.parse(_either(args.listen, settings.serve_listen)),
        services=ServiceOptions(
            instances=tuple(_either(args.instance, settings.serve_instances)),
            read_only=_either(args.read_only, settings.serve_read_only),
            limits=None if max_size is None else Limits.below(_positive(max_size, "--max-size"), grace),
            write_back=_either(args.write_back, settings.serve_write_back),
            executes=bool(_either(args.execute, settings.serve_execute)),
        ),
        sources=settings.local_sources,
        upstream=settings.upstream,
        processes=_positive(_either(args.processes, settings.serve_processes), "--processes", 64),
        tls=_tls(args, settings),
        tokens=_either(args.tokens, settings.serve_tokens),
        insecure=_either(args.insecure, settings.serve_insecure),
        message_bytes=_positive(message, "--max-message", (1 << 31) - 1),
        streams=_positive(_either(args.max_streams, settings.serve_max_streams), "--max-streams"),
        uploads=_positive(_either(args.max_uploads, settings.serve_max_uploads), "--max-uploads"),
        idle_seconds=_duration(args.idle_timeout, settings.serve_idle_timeout, "--idle-timeout"),
        drain_seconds=_duration(args.drain_timeout, settings.serve_drain_timeout),
        http_address=Address.parse(http_listen) if http_listen else None,
        http=HttpOptions(
            names=tuple(name.lower() for name in _either(args.http_name, settings.serve_http_names)),
            validate=_either(args.http_validate_ac, settings.serve_http_validate_ac),
            most=_positive(
                settings.serve_max_body if args.max_body is None else parse_size(args.max_body), "--max-body"
            ),
        ),
        worker=worker_options(args, settings) if _either(args.execute, settings.serve_execute) else None,
        log_level=_either(args.log_level, settings.serve_log_level),
        announce=_announce,
    )


def _tls(args: argparse.Namespace, settings: Settings) -> TlsFiles | None:
    from tools.server.tls import TlsFiles

    certificate = _either(args.tls_certificate, settings.serve_tls_certificate)
    key = _either(args.tls_key, settings.serve_tls_key)
    client_ca = _either(args.tls_client_ca, settings.serve_tls_client_ca)
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise BadInput("TLS needs both --tls-certificate and --tls-key")
    return TlsFiles(certificate, key, client_ca)


def _either(argument: T | None, setting: T) -> T:
    return setting if argument is None else argument


def _positive(number: int, option: str, most: int = sys.maxsize) -> int:
    if not 1 <= number <= most:
        raise BadInput(f"{option} {number}: it is at least 1" + (f" and at most {most}" if most < sys.maxsize else ""))
    return number


def _duration(argument: str | None, setting: int, option: str = "") -> int:
    seconds = setting if argument is None else parse_duration(argument)
    return _positive(seconds, option) if option else seconds


def _announce(line: str) -> None:
    # Flushed, as whoever waits for it may be behind a pipe.
    print(line, flush=True)
