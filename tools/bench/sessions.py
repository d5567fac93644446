"""A native session in a child process, started without `casfs.mounting`: with polling on or off, or under a profiler.

What the session counted comes back when it has been unmounted.
"""

from __future__ import annotations

import cProfile
import os
import pickle
import pstats
import select
import signal
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from casfs.contents import Contents, PlainGateway, ReadOnlyGateway
from casfs.errors import CasfsError
from casfs.fusemount import attach, detach
from casfs.session import Session
from casfs.session_making import make_session
from casfs.tree import ProjectedTree
from store.digest import Digest
from store.repository import Store
from store.trees import find_directory

_START_SECONDS = 20.0
_END_SECONDS = 20.0

Trace = Path | Literal["off"] | None
"""The file that shall get a trace; ``off``: as `casfs mount` makes a session without one; None: the bare class."""


class ProfiledFunction(NamedTuple):
    """One line of a profile: how often it was called, and its own and its callees' seconds."""

    name: str
    calls: int
    own: float
    total: float


@dataclass(slots=True)
class OwnSession:
    """A session that serves `path`; the last two are filled in when its context has ended."""

    path: Path
    pid: int
    statistics: dict[str, Any] = field(default_factory=dict)
    profile: list[ProfiledFunction] = field(default_factory=list)


@contextmanager
def own_session(
    store: Path,
    root: Digest,
    place: Path,
    *,
    passthrough: bool,
    poll: bool = True,
    profile: bool = False,
    trace: Trace = None,
) -> Iterator[OwnSession]:
    """Serve the tree at `place` as long as the context lasts. Raises RuntimeError where that can't be."""
    place.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.setsid()  # a Ctrl-C is for the parent, which unmounts
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            with open(writing, "wb") as pipe:
                _serve(store, root, place, pipe, passthrough=passthrough, poll=poll, profile=profile, trace=trace)
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it must not run on into the parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    session = OwnSession(place, child)
    with open(reading, "rb") as pipe:
        try:
            if not select.select([pipe], [], [], _START_SECONDS)[0] or pipe.read(1) != b"!":
                raise RuntimeError("the session didn't start; see above")
            yield session
        finally:
            for lazy in (False, True):
                with suppress(CasfsError):
                    detach(place, lazy=lazy)
            if not select.select([pipe], [], [], _END_SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
            data = pipe.read()
            os.waitpid(child, 0)
            if data:
                session.statistics, session.profile = pickle.loads(data)  # noqa: S301 - our own child wrote it


def _serve(
    store: Path,
    root: Digest,
    place: Path,
    pipe: Any,
    *,
    passthrough: bool,
    poll: bool,
    profile: bool,
    trace: Trace,
) -> None:
    with Store.open(store, create=False) as opened, ExitStack() as stack:
        with opened.index.view() as view:
            directory = find_directory(view, root)
        if directory is None:
            raise RuntimeError(f"directory {root} is not in the index")
        gateway = ReadOnlyGateway(opened.layout) if passthrough else PlainGateway(opened.blobs)
        contents = Contents(opened.blobs, gateway)
        tree = ProjectedTree(opened.index, directory)
        if trace is None:
            session = Session(attach(place), tree, contents, passthrough=passthrough, poll=poll)
        else:
            tracer = None
            if isinstance(trace, Path):
                from casfs.tracing import Tracer

                tracer = stack.enter_context(closing(Tracer(trace, root, "passthrough")))
            session = make_session(attach(place), tree, contents, passthrough, tracer, poll=poll)
        session.begin()
        pipe.write(b"!")
        pipe.flush()
        profiler = cProfile.Profile()
        if profile:
            profiler.runcall(session.run)
        else:
            session.run()
        pickle.dump((session.statistics(), _functions(profiler) if profile else []), pipe)
        contents.close()


def _functions(profiler: cProfile.Profile) -> list[ProfiledFunction]:
    """The most costly functions first."""
    table: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [ProfiledFunction(_name(place), calls, own, total) for place, (_, calls, own, total, _) in table.items()]
    return sorted(rows, key=lambda row: -row.own)


def _name(place: tuple[str, int, str]) -> str:
    file, line, function = place
    return function if file == "~" else f"{Path(file).stem}.{function}:{line}"
