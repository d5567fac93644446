"""``casfs doctor``: what this machine can do, found out by trying."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from casfs.doctor import Finding, examine
from tools.config import Settings
from tools.exits import Exit
from tools.output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs doctor`` takes."""
    parser.add_argument("--json", action="store_true", help="print a list of {name, ok, how, detail, remedy}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print every finding; exits with 1 if nothing can be mounted or the store can't be used."""
    findings = examine(settings.store)
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table([("", "CAPABILITY", "FOUND", "BY")] + [_row(finding) for finding in findings])
        remedies = [(finding.name, finding.remedy) for finding in findings if finding.remedy and not finding.ok]
        if remedies:
            print("\nwhat would help:")
            print_table([(f"  {name}", remedy) for name, remedy in remedies])
    needed = [finding for finding in findings if finding.name in ("store", "auto")]
    return Exit.OK if all(finding.ok for finding in needed) else Exit.NO


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return ("ok" if finding.ok else "no", finding.name, finding.detail, finding.how)
