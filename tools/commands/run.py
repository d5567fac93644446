"""``casfs run``: one command on the files of a tree, with nothing else to see, and its outputs into the store."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from casfs.capture import Captured, Output
from casfs.holder import WORTH_NODES, HolderOptions, find_holder, start_holder
from casfs.projection import ENGINES
from casfs.sandbox import Finished, Sandbox, Sandboxes, enter_namespace
from store.digest import Digest
from store.entries import printable
from store.errors import BadInput
from store.manifests import check_manifest_name
from store.repository import Store
from tools.commands import complete
from tools.commands._resolve import add_manifest_argument, get_root
from tools.commands._trace import add_trace_argument
from tools.commands._upstream import add_upstream_arguments, apply_upstream
from tools.config import Settings
from tools.exits import Exit
from tools.output import count, print_json, warn

EXAMPLES = """
casfs run src --host-root --output a.o -- cc -c a.c -o a.o   # the compiler is the host's
casfs run image --output out -- ./busybox sh build.sh        # the command is in the tree
casfs run src --host-root --output out --save built -- make  # the outputs become a manifest
casfs run src --trace t --host-root -- make                  # then: casfs trace report t
"""

TIMED_OUT = 124
"""The exit code for a command that took too long: that of timeout(1)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``casfs run`` takes."""
    add_manifest_argument(parser)
    add_upstream_arguments(parser)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --, and its arguments")
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="PATH",
        help="a file, directory or symbolic link to keep, relative to the tree's root; may be repeated",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="a variable for the command, which gets no others"
    )
    parser.add_argument("--chdir", default="", metavar="DIR", help="where to begin, relative to the tree's root")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help=f"end it after that; exit code {TIMED_OUT}")
    parser.add_argument("--network", action="store_true", help="let it use the network")
    parser.add_argument(
        "--host-root", action="store_true", help="let it see the host's directories, read-only: /usr, /etc and others"
    )
    parser.add_argument("--save", metavar="NAME", help="keep the outputs as a manifest, replacing one of that name")
    scratch = parser.add_argument(
        "--scratch", metavar="DIR", help="where it writes (default: beside the blobs, so that nothing is copied)"
    )
    complete(scratch, "directory")
    add_trace_argument(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what shows the tree (default: auto)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say why that engine was chosen")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON report; the command's standard output goes to standard error"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Open a sandbox, run the command, keep its outputs, say what came of it."""
    settings = apply_upstream(args, settings)
    environment = dict(map(_variable, args.env))
    directory = _directory(args.chdir)
    if args.save:
        check_manifest_name(args.save)
    # Before the store is opened: a process with threads can't change its user namespace.
    holder = None
    if args.engine in ("auto", "kernel") and settings.run_keep_warm and args.trace is None:
        holder = find_holder(settings.store, _upstream(settings))
    if holder is not None:
        holder.enter()
    else:
        enter_namespace()
    with Store.open(settings.store, create=settings.upstream_url is not None, sources=settings.sources) as store:
        root = get_root(store, args.manifest).directory.digest
        scratch = Path(args.scratch) if args.scratch else None
        with (
            Sandboxes(store, scratch=scratch, engine=args.engine, layouts=holder) as sandboxes,
            sandboxes.open(root, outputs=map(os.fsencode, args.output), trace=args.trace) as sandbox,
        ):
            sys.stdout.flush()
            finished = sandbox.run(
                args.command,
                environment=environment,
                directory=directory,
                timeout=args.timeout,
                network=args.network,
                host_root=args.host_root,
                stdin=None,
                stdout=sys.stderr.fileno() if args.json else None,
            )
            upcalls = sandbox.projection.upcalls()
            captured = None if finished.timed_out else sandbox.capture()
            _warn(args, finished, captured, sandbox)
        if captured is not None and args.save:
            store.manifests.put(args.save, captured.root, f"run {args.manifest}", replace=True)
        report = _report(finished, captured, sandbox, upcalls)
        if holder is None and sandbox.projection.laid_out >= WORTH_NODES and settings.run_keep_warm:
            _start_holder(root, settings)
    if args.json:
        print_json(report)
    elif captured is not None:
        _print(captured, report, args)
    missing = captured is not None and captured.missing
    return finished.code or (Exit.NO if missing else Exit.OK)


def _upstream(settings: Settings) -> str:
    """As a holder is told it."""
    if settings.upstream_url is None:
        return ""
    from tools.upstream.options import dump_upstream

    return dump_upstream(settings.upstream)


def _start_holder(root: Digest, settings: Settings) -> None:
    """So that the next command on this tree, or one like it, finds its layers ready."""
    sources = settings.sources
    start_holder(
        HolderOptions(
            str(settings.store),
            settings.run_keep_warm,
            settings.run_warm_memory or 0,
            tuple(map(str, sources.directories)),
            sources.timeout,
            str(root),
            _upstream(settings),
        ),
        "tools.holder",
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise BadInput(f"--env {text!r}: write NAME=VALUE")
    return name, value


def _directory(text: str) -> str:
    if text.startswith("/") or ".." in text.split("/"):
        raise BadInput(f"--chdir {text!r}: a directory of the tree, relative to its root, without '..'")
    return text


def _warn(args: argparse.Namespace, finished: Finished, captured: Captured | None, sandbox: Sandbox) -> None:
    if finished.timed_out:
        warn(f"the command took longer than {args.timeout:g} s and was ended; its outputs are not kept")
    if finished.disk_full:
        warn(f"the scratch disk of {sandbox.scratch.base} is full: --scratch names another place")
    if captured is None:
        return
    for path in captured.missing:
        warn(f"output {printable(path)} was not made")
    for path, why in captured.skipped:
        warn(f"{printable(path)} is not kept: {why}")


def _report(finished: Finished, captured: Captured | None, sandbox: Sandbox, upcalls: int) -> dict[str, Any]:
    captured = captured or Captured(root=sandbox.root)
    return {
        "exit_code": finished.code,
        "timed_out": finished.timed_out,
        "disk_full": finished.disk_full,
        "seconds": round(finished.seconds, 6),
        "engine": sandbox.projection.engine,
        "why": sandbox.projection.why,
        "upcalls": upcalls,
        "laid_out": sandbox.projection.laid_out,
        "root": None if finished.timed_out else str(captured.root),
        "outputs": [_describe(output) for output in captured.outputs],
        "missing": [os.fsdecode(path) for path in captured.missing],
        "skipped": [{"path": os.fsdecode(path), "why": why} for path, why in captured.skipped],
        "deleted": [os.fsdecode(path) for path in captured.deleted],
        "unexpected": [os.fsdecode(path) for path in captured.unexpected],
    }


def _describe(output: Output) -> dict[str, Any]:
    described: dict[str, Any] = {"path": os.fsdecode(output.path), "kind": output.kind}
    if output.target is not None:
        described["target"] = os.fsdecode(output.target)
    else:
        described["digest"] = str(output.digest)
    if output.kind == "file":
        described["executable"] = output.executable
    return described


def _print(captured: Captured, report: dict[str, Any], args: argparse.Namespace) -> None:
    for output in captured.outputs:
        what = f"-> {os.fsdecode(output.target)}" if output.target is not None else str(output.digest)
        print(f"{os.fsdecode(output.path)}{'/' if output.kind == 'directory' else ''}  {what}")
    for word, paths in (("deleted", captured.deleted), ("not an output", captured.unexpected)):
        for path in paths:
            print(f"{word}: {os.fsdecode(path)}", file=sys.stderr)
    lacking = args.engine == "auto" and report["engine"] != "kernel" and args.trace is None
    why = f": {report['why']}" if args.verbose or lacking else ""
    print(
        f"exit code {report['exit_code']}, {report['seconds']:.3f} s, {count(report['upcalls'], 'upcall')} "
        f"(engine {report['engine']}{why})",
        file=sys.stderr,
    )
