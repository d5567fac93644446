"""Pages for a person: what the store has, and from there into trees, results and blobs.

Rendered here, whole, without a script: `tools.server.markup` escapes what
isn't markup, and nothing of a path reaches the file system but a digest that
was parsed. What is shown of anything is bounded. Blocking; for a thread.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlencode

from google.protobuf.message import DecodeError

from store.action_cache import action_key
from store.digest import Digest, DigestFunction
from store.directory import decode_directory
from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, SymlinkEntry
from store.errors import BadInput, StoreError
from store.repository import Store
from store.trees import find_directory, list_entries
from tools.output import count, format_size
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server import plot
from tools.server.action_pages import (
    ACTION_HEAD,
    CALLS_HEAD,
    RUNNING_HEAD,
    action_row,
    calls_row,
    report_details,
    running_row,
)
from tools.server.calls_under_way import LINES_MOST, Group, count_rest
from tools.server.downloads import Downloads
from tools.server.errors import InvalidArgument, NotThere, Unavailable
from tools.server.http_names import page_path, parse_page_path
from tools.server.markup import Child, Markup, join, table, tag
from tools.server.metrics import Metrics, Sizes
from tools.server.page_style import POLICY, STYLE
from tools.server.preview import PREVIEW_BYTES, preview
from tools.server.recent import Recent, ResultEvent
from tools.server.requests import read_digest
from tools.server.scheduler import Scheduler

_ROWS_MOST = 5000
_MANIFESTS_MOST = 200
_ACTIONS_SHOWN = 25
_MESSAGE_BYTES_MOST = 16 << 20
"""Of a Directory or a result that is shown: it is read into memory."""


class Page(NamedTuple):
    """A whole page, and the policy that goes with it."""

    html: str
    policy: str = POLICY


class Pages:
    """The pages of one store."""

    def __init__(
        self,
        store: Store,
        downloads: Downloads,
        sizes: Callable[[], Sizes],
        metrics: Metrics,
        recent: Recent,
        scheduler: Scheduler | None = None,
        list_calls: Callable[[], Sequence[Group]] = tuple,
    ) -> None:
        """`scheduler`: of the actions that are run here, if any are. `list_calls` waits for the loop."""
        self._list_calls = list_calls
        self._scheduler = scheduler
        self._store = store
        self._downloads = downloads
        self._sizes = sizes
        self._metrics = metrics
        self._recent = recent

    def get(self, path: str, query: str) -> Page:
        """The page at a path (as in the request, without the query). Raises NotThere, BadDigest, MissingBlob."""
        if path == "/":
            return self._overview()
        if path == "/calls":
            return self._calls()
        name = parse_page_path(path)
        if name is None:
            raise NotThere(f"there is no page {path[:80]!r}")
        if name.kind == "tree":
            return self._tree(name.digest)
        if name.kind == "blob":
            return self._blob(name.digest)
        return self._result(name.digest, parse_qs(query).get("instance", [""])[0])

    # The store.

    def _overview(self) -> Page:
        minutes = plot.by_minute(self._recent.samples, time.time())
        return _page(
            "casfs",
            join(
                self._numbers(),
                self._waiting(),
                tag("h2", "Hit rate, the last hour"),
                plot.draw(minutes),
                _key(),
                self._actions(),
                tag("h2", "Recent action results"),
                table(
                    ("action", "instance", "what", "hits", "when"), map(_event_row, self._recent.results), "None yet."
                ),
                tag("h2", "Manifests"),
                self._manifests(),
                tag("h2", "Mounts and other leases"),
                self._leases(),
            ),
            str(self._store.layout.root),
        )

    def _actions(self) -> Markup | None:
        if self._scheduler is None:
            return None
        now, numbers = time.time(), self._scheduler.statistics()
        running = [running_row(*item, now) for item in self._scheduler.running()]
        return join(
            tag("h2", "Actions"),
            tag("p", f"{numbers['running']} running, {numbers['queued']} waiting, {numbers['merged']} joined another."),
            table(RUNNING_HEAD, running, "") if running else None,
            table(ACTION_HEAD, map(action_row, self._recent.actions[:_ACTIONS_SHOWN]), "None was run yet."),
        )

    def _numbers(self) -> Markup:
        sizes, lookups = self._sizes(), self._metrics.lookups()
        total = lookups.hits + lookups.misses
        rate = f"{lookups.hits / total:.1%}" if total else "-"
        limit = f"of {format_size(sizes.limit)}" if sizes.limit else "no limit"
        free = shutil.disk_usage(self._store.layout.root).free
        return tag(
            "dl",
            _number("Store", format_size(sizes.used), limit),
            _number("Hit rate", rate, f"{count(int(total), 'lookup')} since the start"),
            _number("Free on its disk", format_size(free)),
        )

    def _waiting(self) -> Markup:
        pressure, overloaded = self._metrics.waiting()
        link = _link("/calls", "Calls under way")
        if not overloaded and not any(pressure):
            return tag("p", link)
        storing = f"{count(pressure.storing, 'blob')} {'is' if pressure.storing == 1 else 'are'} being stored"
        return tag("p", "Overloaded: " if overloaded else "", f"{pressure}, {storing}. ", link)

    def _calls(self) -> Page:
        try:
            groups = self._list_calls()
        except TimeoutError:
            raise Unavailable("the event loop doesn't answer; SIGUSR1 has its threads written to the log") from None
        rest = count_rest(groups, LINES_MOST)
        return _page(
            "Calls",
            join(
                tag("h2", "Calls under way"),
                tag("p", f"Of process {os.getpid()}, the oldest first; times in seconds."),
                table(CALLS_HEAD, map(calls_row, groups[:LINES_MOST]), "None."),
                tag("p", f"and {count(rest, 'call')} more", class_="note") if rest else None,
            ),
        )

    def _manifests(self) -> Markup:
        manifests = self._store.manifests.list()
        rows = (
            (
                _link(page_path("tree", manifest.root), manifest.name),
                manifest.source,
                "all here" if not manifest.missing else f"{count(manifest.missing, 'blob')} missing",
                _when(manifest.created),
            )
            for manifest in manifests[:_MANIFESTS_MOST]
        )
        shown = table(("name", "from", "blobs", "made"), rows, "None.")
        return join(shown, _more(len(manifests), _MANIFESTS_MOST))

    def _leases(self) -> Markup:
        rows = (
            (lease.holder, lease.kind, [_tree_link(root) for root in lease.roots[:20]], _when(lease.since))
            for lease in self._store.leases.living()
        )
        return table(("holder", "kind", "roots", "since"), rows, "Nothing is mounted.")

    # A tree.

    def _tree(self, digest: Digest) -> Page:
        entries, total = self._list(digest)
        rows = [_entry_row(entry) for entry in entries]
        return _page(
            "Tree",
            join(
                tag("h2", "Tree"),
                tag("p", tag("code", str(digest))),
                tag("p", f"{count(total, 'entry')}. ", _link(page_path("blob", digest), "Its Directory message")),
                table(("name", "what", "size"), rows, "It is empty."),
                _more(total, _ROWS_MOST),
            ),
        )

    def _list(self, digest: Digest) -> tuple[list[Entry], int]:
        """The first entries of a directory, and how many there are."""
        with self._store.index.view() as view:
            directory = find_directory(view, digest)
            if directory is not None and directory.digest == digest:
                rows = list_entries(view, directory.id)
                entries = [row.entry for row in islice(rows, _ROWS_MOST)]
                return entries, len(entries) + sum(1 for _ in rows)
        entries = decode_directory(self._read(digest), digest.function)
        return entries[:_ROWS_MOST], len(entries)

    def _read(self, digest: Digest) -> bytes:
        if digest.size > _MESSAGE_BYTES_MOST:
            raise InvalidArgument(f"{digest} is too large to be shown so")
        return self._downloads.read(digest)

    # A blob.

    def _blob(self, digest: Digest) -> Page:
        descriptor = self._downloads.open(digest)
        try:
            beginning = os.pread(descriptor, PREVIEW_BYTES, 0)
        finally:
            os.close(descriptor)
        kind, text = preview(beginning, whole=digest.size <= len(beginning))
        is_tree = self._is_tree(digest, beginning)
        part = "" if digest.size <= len(beginning) and kind == "text" else ", the beginning"
        return _page(
            "Blob",
            join(
                tag("h2", "Blob"),
                tag("p", tag("code", str(digest))),
                tag(
                    "p",
                    f"{digest.size:,} bytes. ",
                    tag("a", "Download", href=f"/cas/{digest.hex}", download=digest.hex),
                    [" · ", _link(page_path("tree", digest), "Look at it as a tree")] if is_tree else None,
                ),
                tag("h2", f"As {kind}{part}") if digest.size else None,
                tag("pre", text) if digest.size else tag("p", "It has no bytes.", class_="empty"),
            ),
        )

    def _is_tree(self, digest: Digest, beginning: bytes) -> bool:
        """Whether it is known as a tree, or so small that it can be tried."""
        with self._store.index.view() as view:
            if find_directory(view, digest) is not None:
                return True
        try:
            return len(beginning) == digest.size > 0 and bool(decode_directory(beginning, digest.function))
        except StoreError:
            return False

    # A result.

    def _result(self, action: Digest, instance: str) -> Page:
        message = self._store.actions.read(action_key(action, instance))
        report = self._recent.find_action(action, instance)
        if message is None or len(message) > _MESSAGE_BYTES_MOST:
            if report is None:
                raise NotThere(f"no result of action {action.hex}")
            result = report.result
        else:
            try:
                result = reapi.ActionResult.FromString(message)
            except DecodeError:
                raise InvalidArgument(f"what is kept of action {action.hex} is no ActionResult") from None
        rows = [] if result is None else list(islice(_outputs(result, action.function), _ROWS_MOST))
        return _page(
            "Result",
            join(
                tag("h2", "Result of an action"),
                tag("p", tag("code", f"{action.function.label}:{action.hex}")),
                None if result is None else tag("p", f"Exit code {result.exit_code}."),
                table(("output", "what", "size"), rows, "It has no outputs."),
                None if report is None else report_details(report),
            ),
        )


def _page(title: str, body: Markup, about: str = "") -> Page:
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title if title == "casfs" else f"{title} - casfs"),
        tag("style", Markup(STYLE)),
    )
    top = tag("header", tag("h1", tag("a", "casfs", href="/")), tag("p", about))
    return Page("<!doctype html>\n" + tag("html", head, tag("body", top, tag("main", body)), lang="en"))


def _number(name: str, value: str, more: str = "") -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))


def _key() -> Markup:
    words = (("hit", "hits"), ("miss", "misses"), ("rate", "hit rate"))
    return tag("p", [tag("span", text, class_=kind) for kind, text in words], class_="key")


def _link(path: str, text: str) -> Markup:
    return tag("a", text, href=path)


def _tree_link(digest: Digest) -> Markup:
    return tag("div", _link(page_path("tree", digest), f"{digest.function.label}:{digest.hex[:16]}…"))


def _shown(name: bytes) -> str:
    """A name as a person reads it; what can't be seen is written out."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _more(total: int, most: int) -> Markup | None:
    return tag("p", f"and {total - most:,} more", class_="note") if total > most else None


def _event_row(event: ResultEvent) -> Iterable[Child]:
    short = event.action.hex[:16] + "…"
    if event.opaque:
        instance = "".join(f"/{quote(part)}" for part in event.instance.split("/") if part)
        link = tag("a", short, href=f"{instance}/ac/{event.action.hex}", download=event.action.hex)
    else:
        query = urlencode({"instance": event.instance}) if event.instance else ""
        link = _link(page_path("result", event.action) + (f"?{query}" if query else ""), short)
    return tag("code", link), event.instance or "-", event.what, f"{event.hits:,}", _when(event.when)


def _entry_row(entry: Entry) -> Iterable[Child]:
    name = _shown(entry.name)
    match entry:
        case DirectoryEntry(digest=digest):
            return _link(page_path("tree", digest), f"{name}/"), "directory", ""
        case FileEntry(digest=digest, executable=executable):
            what = "executable" if executable else "file"
            return _link(page_path("blob", digest), name), what, f"{digest.size:,}"
        case SymlinkEntry(target=target):
            return name, f"link to {_shown(target)}", ""
        case ReferenceEntry(path=path, stamp=stamp):
            return name, f"by reference: {_shown(path)}", f"{stamp.size:,}"


def _outputs(result: reapi.ActionResult, function: DigestFunction) -> Iterable[Iterable[Child]]:
    def blob(name: str, what: str, message: reapi.Digest) -> Iterable[Child]:
        try:
            digest = read_digest(message, function)
        except BadInput:
            return name, f"{what}, without a right digest", ""
        return _link(page_path("blob", digest), name), what, f"{digest.size:,}"

    for file in result.output_files:
        yield blob(file.path, "executable" if file.is_executable else "file", file.digest)
    for directory in result.output_directories:
        yield blob(f"{directory.path}/", "directory, a Tree message", directory.tree_digest)
    for link in result.output_symlinks:
        yield link.path, f"link to {link.target}", ""
    for name, message in (("stdout", result.stdout_digest), ("stderr", result.stderr_digest)):
        if message.size_bytes:
            yield blob(name, "printed", message)
