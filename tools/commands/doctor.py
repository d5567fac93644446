"""``casfs doctor``: what this machine can do, found out by trying."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from casfs.doctor import Finding, examine
from tools.config import Settings
from tools.exits import Exit
from tools.output import print_json

EXAMPLES = """
casfs doctor                          # for the store that would be used
casfs --store /srv/casfs doctor       # for one on another disk
casfs doctor --json > doctor.json     # to send along with a report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs doctor`` takes."""
    parser.add_argument("--json", action="store_true", help="print a list of {name, ok, how, detail, remedy}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print every finding; exits with 1 if nothing can be mounted or the store can't be used."""
    findings = examine(settings.store)
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    needed = [finding for finding in findings if finding.name in ("store", "auto")]
    return Exit.OK if all(finding.ok for finding in needed) else Exit.NO


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok' if finding.ok else 'no'}  {finding.name:{width}}  {finding.detail}")
        print(f"{'':{width + 6}}how: {finding.how}")
        if finding.remedy and not finding.ok:
            print(f"{'':{width + 6}}to get it: {finding.remedy}")
