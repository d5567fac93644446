"""The parts of pages that show calls, and actions which were run: values to markup, no I/O."""

from __future__ import annotations

import time
from collections.abc import Iterable
from urllib.parse import urlencode

from store.digest import Digest
from tools.server.calls_under_way import Group
from tools.server.http_names import page_path
from tools.server.markup import Child, Markup, join, table, tag
from tools.server.scheduler import Execution
from tools.worker.report import Report
from tools.worker.work import Stage

ACTION_HEAD = ("action", "command", "ended", "fetch", "run", "upload", "when")
RUNNING_HEAD = ("action", "operation", "stage", "for")
CALLS_HEAD = ("method", "client", "where", "calls", "oldest", "youngest", "without progress", "waits for")
_COMMAND_SHOWN = 80


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.1f} ms"


def _link(action: Digest, instance: str) -> Markup:
    query = f"?{urlencode({'instance': instance})}" if instance else ""
    return tag("code", tag("a", action.hex[:16] + "…", href=page_path("result", action) + query))


def calls_row(group: Group) -> Iterable[Child]:
    """A row under `CALLS_HEAD`."""
    ages = (f"{seconds:,.1f}" for seconds in (group.oldest, group.youngest, group.stalled))
    return group.method, group.client or "-", group.where, f"{group.number:,}", *ages, group.reason.value


def action_row(report: Report) -> Iterable[Child]:
    """A row under `ACTION_HEAD`."""
    ended = report.status if report.status != "OK" else f"exit code {report.code}"
    stages = [_milliseconds(report.stages.get(stage)) for stage in Stage]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.when))
    return _link(report.action, report.instance), tag("code", report.command[:_COMMAND_SHOWN]), ended, *stages, when


def running_row(execution: Execution, stage: Stage | None, now: float) -> Iterable[Child]:
    """A row under `RUNNING_HEAD`; `now` in seconds since the epoch."""
    link = _link(execution.action, execution.instance)
    return link, execution.name, stage.value if stage else "begins", f"{now - execution.queued:,.1f} s"


def report_details(report: Report) -> Markup:
    """How an action ran."""
    rows: list[Iterable[Child]] = [("waited", _milliseconds(report.queued))]
    rows += [(stage.value, _milliseconds(report.stages.get(stage))) for stage in Stage]
    rows += [(name.replace("_", " "), f"{number:,}") for name, number in report.numbers.items()]
    root = None
    if report.root is not None:
        root = tag("p", "Its ", tag("a", "input root", href=page_path("tree", report.root)), ".")
    return join(
        tag("h2", "How it ran"),
        tag("pre", report.command),
        root,
        [tag("p", note, class_="note") for note in report.notes],
        table(("what", "how much"), rows, ""),
    )
