"""`python -m tools.bench [SCENARIO …]`: measure, print a table, write JSON.

Each scenario runs in a process of its own, freshly started: what one leaves in
memory would be copied into the daemons of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tools.bench import picture, report
from tools.bench.machine import describe
from tools.bench.measuring import FleetSettings, Settings
from tools.bench.running import run_apart
from tools.bench.scenarios import GROUPS, MODULES, load
from tools.bench.scratch import ending_on_signals, scratch_directory
from tools.bench.volumes import journaled

_REPOSITORY = Path(__file__).resolve().parents[2]
_PICTURE = "benchmarks.svg"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where a scenario failed: a missed aim is a result, not a failure."""
    options = _parse(arguments)
    with ending_on_signals(), scratch_directory(options.scratch, "bench") as scratch:
        if options.profile:
            return _profile(scratch, quick=options.quick)
        machine: dict[str, str | int] = {}
        results = {}
        failed = []
        for name in _chosen(options):
            place = scratch / name
            place.mkdir()
            began = time.monotonic()
            print(f"{name} …", file=sys.stderr, flush=True)
            with nullcontext(place) if options.quick else journaled(place) as volume:
                machine = machine or describe(volume)
                fleet = FleetSettings(options.clients, options.files, options.core)
                outcome = run_apart(name, Settings(volume, options.quick, options.repeat, fleet))
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if outcome is None:
                failed.append(name)
            else:
                results[name] = (load(name).about, outcome)
    command = _command(options)
    text = report.as_markdown(machine, command, results)
    value = report.as_json(machine, command, results)
    if options.write and not failed:
        _write(options.output, options.group, text, value)
    else:
        print(text, end="")
    if options.json:
        options.json.write_text(_dump(value))
    if failed:
        print(f"failed: {', '.join(failed)}" + ("; nothing was written" * options.write), file=sys.stderr)
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> list[str]:
    names = list(options.scenario or (GROUPS[options.group] if options.group else MODULES))
    if options.bazel and "fleet-bazel" not in names:
        names.append("fleet-bazel")
    return names


def _write(directory: Path, group: str | None, text: str, value: dict[str, Any]) -> None:
    # The first group has the plain name, as all together have.
    suffix = f"-{group}" if group and group != next(iter(GROUPS)) else ""
    (directory / f"BENCHMARKS{suffix.upper()}.md").write_text(text)
    (directory / f"benchmarks{suffix}.json").write_text(_dump(value))
    drawn = picture.as_svg(value)
    if drawn is not None:
        (directory / _PICTURE).write_text(drawn)


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Measure casfs on this machine.")
    parser.add_argument(
        "scenario", nargs="*", metavar="SCENARIO", help=f"what to measure: {', '.join(MODULES)} (default: all)"
    )
    parser.add_argument("--repeat", "--runs", type=int, metavar="N", help="repeat each measure so often")
    parser.add_argument("--quick", action="store_true", help="small sizes, once each: shows that it works, no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make stores (default: temporary files)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write BENCHMARKS.md, benchmarks.json and the picture in place of printing the tables; of all "
        "scenarios, or with --group of those (then the files have its name)",
    )
    parser.add_argument("--group", choices=GROUPS, help="measure these scenarios")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=_REPOSITORY, help="where --write writes (default: the repository)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="profile the native session's loop per upcall, and nothing else"
    )
    fleet = parser.add_argument_group("many clients at once (the scenarios fleet and fleet-bazel)")
    fleet.add_argument("--bazel", action="store_true", help="build with real Bazels, too: the scenario fleet-bazel")
    fleet.add_argument("--clients", type=_positive, metavar="N", help="so many clients in every row")
    fleet.add_argument("--files", type=_positive, metavar="N", help="so many files of each client")
    fleet.add_argument(
        "--core", type=_positive, metavar="PERCENT", help="hold the server to so much of one core, by a control group"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.scenario if name not in MODULES]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}: choose from {', '.join(MODULES)}")
    if options.scenario and (options.write or options.group):
        # The files say "one run", and would lose the other scenarios.
        parser.error("--write takes all scenarios or a --group of them; --json FILE writes a part")
    if options.bazel and "fleet" not in options.scenario:
        parser.error("--bazel goes with the scenario fleet")
    if options.repeat is not None and options.repeat < 1:
        parser.error("--repeat takes a number from 1 on")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _command(options: argparse.Namespace) -> str:
    words = ["python -m tools.bench", *options.scenario]
    if options.group:
        words.append(f"--group {options.group}")
    if options.quick:
        words.append("--quick")
    if options.repeat:
        words.append(f"--repeat {options.repeat}")
    words += ["--bazel"] * options.bazel
    words += [f"--{name} {value}" for name in ("clients", "files", "core") if (value := getattr(options, name))]
    return " ".join(words)


def _profile(scratch: Path, *, quick: bool) -> int:
    from tools.bench.upcalls import profile

    # All of them before anything is printed: whoever reads may stop early (head), and that ends the program.
    for text in [report.profile_as_text(*profiled) for profiled in profile(Settings(scratch, quick))]:
        print(text, end="\n\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        # Not SIGPIPE's default: the daemons would inherit it. The interpreter's own flush must find no pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
