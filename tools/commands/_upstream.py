"""The options that name an upstream, for every verb that may fetch; each is also a key under [sources]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.commands import complete
from tools.config import Settings


def add_upstream_arguments(parser: argparse.ArgumentParser) -> None:
    """``--upstream`` and what belongs to it."""
    parser.add_argument(
        "--upstream",
        metavar="URL",
        help="a remote cache to fetch from what is missing: grpc://HOST[:PORT][/INSTANCE], or grpcs:// for TLS",
    )
    for name, text in (
        ("--upstream-token", "a file with a bearer token for the upstream"),
        ("--upstream-tls-ca", "a PEM file: the authority of the upstream's certificate (default: gRPC's own list)"),
        ("--upstream-tls-certificate", "a PEM file: our certificate for the upstream"),
        ("--upstream-tls-key", "a PEM file: our certificate's key"),
    ):
        complete(parser.add_argument(name, metavar="FILE", type=Path, help=text), "file")


def apply_upstream(args: argparse.Namespace, settings: Settings) -> Settings:
    """The settings with what the command line said of the upstream. Raises BadInput for what can't be."""
    said = {
        "upstream_url": args.upstream,
        "upstream_token": args.upstream_token and args.upstream_token.absolute(),
        "upstream_tls_ca": args.upstream_tls_ca and args.upstream_tls_ca.absolute(),
        "upstream_tls_certificate": args.upstream_tls_certificate and args.upstream_tls_certificate.absolute(),
        "upstream_tls_key": args.upstream_tls_key and args.upstream_tls_key.absolute(),
    }
    settings = settings._replace(**{name: value for name, value in said.items() if value is not None})
    _ = settings.upstream  # checked now, not when it is first needed
    return settings
