"""A decorator that brings in, before the command starts, those inputs that actions of its kind opened before.

`tools.worker.profiles` says what a kind is and how profiles learn. What is not
in the profile comes when it is first opened, as without one. Where nothing is
missing this costs a look at one small file and at the paths in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from store.digest import Digest
from store.entries import FileEntry
from store.presence import Finder, as_name
from store.repository import Store
from store.trees import find_path, get_directory, walk
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.worker.prefetching import bring_in
from tools.worker.profiles import TRUSTED, Kind, Profile, Profiles, kind_of, learn
from tools.worker.run import Executor, Run
from tools.worker.work import Stage


class Profiled:
    """Pays where few of many inputs are read, and a source is far away: those few come in few calls."""

    def __init__(self, inner: Executor, store: Store, profiles: Profiles) -> None:
        self._inner = inner
        self._store = store
        self._profiles = profiles

    def execute(self, run: Run) -> reapi.ExecuteResponse:
        """The inner executor's response. Raises NoSpace."""
        task, metadata = run.task, run.metadata
        assert task is not None  # noqa: S101 - it was fetched
        with run.stage(Stage.FETCHING, metadata.input_fetch_start_timestamp, metadata.input_fetch_completed_timestamp):
            kind = kind_of(task)
            profile = self._profiles.find(kind)
            missing = self._find_missing(task.root, kind, profile)
            ahead = {path for path in missing if profile[path] < TRUSTED}
            if ahead:
                # What can't be fetched is no failure yet: perhaps nobody opens it.
                bring_in(self._store, [missing[path] for path in ahead], run)
        with self._store.hydrator.noting() as opened:
            response = self._inner.execute(run)
        # A command that failed may have ended before it opened what it needs.
        if not response.status.code and not response.result.exit_code and (opened or missing):
            paths = [kind.general(path) for path in self._find_paths(task.root, opened)] if opened else []
            self._profiles.keep(kind, learn(profile, paths, ahead, missing.keys() - ahead))
        return response

    def _find_missing(self, root: Digest, kind: Kind, profile: Profile) -> dict[str, Digest]:
        """The profile's paths that the input root has, and whose blobs are not here."""
        if not profile:
            return {}
        found: dict[str, Digest] = {}
        with self._store.index.view() as view:
            directory = get_directory(view, root)
            for general in profile:
                path = kind.special(general)
                row = find_path(view, directory.id, path)
                if row is not None and isinstance(row.entry, FileEntry):
                    found[general] = row.entry.digest
        absent = set(self._here.find_absent({as_name(digest): None for digest in found.values()}))
        return {path: digest for path, digest in found.items() if as_name(digest) in absent}

    @property
    def _here(self) -> Finder:
        return self._store.presence

    def _find_paths(self, root: Digest, digests: set[Digest]) -> Iterable[bytes]:
        """Where the input root has these blobs; nothing of those that it doesn't have."""
        with self._store.index.view() as view:
            for path, entry in walk(view, get_directory(view, root)):
                if isinstance(entry, FileEntry) and entry.digest in digests:
                    yield path
