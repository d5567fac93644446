"""What is known of the inputs that actions of one kind open: values, their text, and files of it in the store.

A *kind* is a command line and a platform, with the name of what is made taken
out: of ``cc -c src/a.c -o out/a.o`` and ``cc -c src/b.c -o out/b.o``, which
make ``a`` and ``b``, one profile serves both. Paths are of the input root, with
that name taken out, too: so ``src/a.c`` there becomes ``src/b.c`` here. Digests
would be of no use: an input that has changed is what has to be fetched.

Only an open that had to fetch is seen (`store.hydration.Hydrator.noting`), and
what was fetched ahead is opened unseen. So each path has a count of the times
that it was fetched ahead since it was last seen opened. At `TRUSTED` times it
is not fetched ahead once: an action that needs it fetches it by opening it, and
the count begins anew; one that doesn't has it leave the profile. So of what is
needed one in `TRUSTED` comes late, and what isn't needed any more is fetched
`TRUSTED` times at most. New paths begin at different counts, so that their
turns don't come together. What is here already says nothing and changes nothing.
What another action opens at the same moment counts, too, where both have it:
one that this kind doesn't need leaves by its turn.

A profile is a hint. One that is damaged is ignored, and replaced; of two
written at once the later stays; beyond `PROFILES_MOST` the oldest go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from store.entries import split_path
from store.errors import BadName
from tools.worker.task import Task

log = logging.getLogger("casfs.worker")

TRUSTED = 16
"""So many times a path is fetched ahead without anybody's having been seen to open it."""
PATHS_MOST = 4096
PROFILES_MOST = 512
_BYTES_MOST = 1 << 20
_VERSION = 1
_NAME = "\0"
"""Stands for the name of what is made: no path and no argument has it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """`key` names the profile. `name` is that of what this action makes, empty where it declares nothing."""

    key: str
    name: str

    def general(self, path: bytes) -> str:
        """A path of this action, as the profile has it."""
        return _take_out(self.name, os.fsdecode(path))

    def special(self, path: str) -> bytes:
        """A path of the profile, as this action has it."""
        return os.fsencode(path.replace(_NAME, self.name))


def kind_of(task: Task) -> Kind:
    """The kind of an action."""
    name = ""
    if task.outputs:
        # Up to the first dot: of a.pic.o and a.d it is a.
        name = task.outputs[0].path.rpartition("/")[2].partition(".")[0]
    said = [_take_out(name, argument) for argument in task.arguments]
    described = json.dumps([_VERSION, said, task.directory, sorted(task.platform)])
    return Kind(hashlib.sha256(described.encode()).hexdigest(), name)


def _take_out(name: str, text: str) -> str:
    """As a word only: to be called ``a`` mustn't change ``cat``."""
    return re.sub(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", _NAME, text) if name else text


Profile = Mapping[str, int]
"""General paths, and how often each was fetched ahead since it was last seen opened."""


def encode(profile: Profile) -> bytes:
    """The text of a profile."""
    return json.dumps({"version": _VERSION, "paths": profile}).encode("ascii")


def decode(text: bytes) -> Profile:
    """A profile from its text. Raises ValueError."""
    try:
        found = json.loads(text)
        if found["version"] != _VERSION:
            return {}
        profile = {str(path): int(times) for path, times in found["paths"].items()}
        for path in profile:
            split_path(os.fsencode(path.replace(_NAME, "_")), "profile")
    except (TypeError, LookupError, AttributeError, RecursionError, BadName) as error:
        raise ValueError(f"no profile: {error}") from error
    return profile


def learn(profile: Profile, opened: Iterable[str], ahead: Collection[str], left: Collection[str]) -> Profile:
    """The profile after one more action that went well.

    `opened`: what it fetched by opening it. `ahead`: what was fetched ahead.
    `left`: what was missing and, its turn having come, was left to be opened.
    """
    learnt = dict.fromkeys(opened, 0)
    for path in learnt:
        if path not in profile:
            learnt[path] = zlib.crc32(path.encode("utf-8", "surrogateescape")) % TRUSTED
    for path, times in profile.items():
        if path not in learnt and path not in left:
            learnt[path] = times + 1 if path in ahead else times
    if len(learnt) > PATHS_MOST:
        newest = sorted(learnt, key=learnt.__getitem__)[:PATHS_MOST]
        learnt = {path: learnt[path] for path in newest}
    return learnt


class Profiles:
    """The profiles of one store. Threads and processes may share them."""

    def __init__(self, directory: Path) -> None:
        """The directory is made when there is something to keep."""
        self._directory = directory

    def find(self, kind: Kind) -> Profile:
        """What is known; empty where nothing is, or it is damaged."""
        path = self._path(kind)
        try:
            with open(path, "rb") as file:
                text = file.read(_BYTES_MOST + 1)
            profile = decode(text)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("the profile %s is ignored: %s", path, error)
            return {}
        with suppress(OSError):
            os.utime(path)  # used last, removed last
        return profile

    def keep(self, kind: Kind, profile: Profile) -> None:
        """Replace what is known. That it can't be kept is logged."""
        text = encode(profile)
        if len(text) > _BYTES_MOST:
            log.warning("a profile of %d bytes is not kept: the most is %d", len(text), _BYTES_MOST)
            return
        path = self._path(kind)
        new = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.new")
        try:
            self._directory.mkdir(exist_ok=True)
            begun = not path.exists()
            # Not synced: what a crash leaves of it is read as damaged.
            new.write_bytes(text)
            new.replace(path)
            if begun:
                self._remove_oldest()
        except OSError as error:
            log.warning("can't keep the profile %s: %s", path, error)

    def _path(self, kind: Kind) -> Path:
        return self._directory / f"{kind.key}.json"

    def _remove_oldest(self) -> None:
        """Beyond what is kept; files that a killed worker didn't come to rename grow old, too."""
        with os.scandir(self._directory) as found:
            ages = {}
            for entry in found:
                with suppress(FileNotFoundError):
                    ages[entry.path] = entry.stat().st_mtime
        for path in sorted(ages, key=ages.__getitem__)[: max(0, len(ages) - PROFILES_MOST)]:
            with suppress(FileNotFoundError):
                os.unlink(path)
