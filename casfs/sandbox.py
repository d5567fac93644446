"""Writable sandboxes: an input root, host scratch over it, one command at a time in namespaces of its own.

    enter_namespace()                      # once, in a process with one thread
    with Sandboxes(store) as sandboxes:
        with sandboxes.open(root, outputs=[b"out/a.o"]) as sandbox:
            finished = sandbox.run(["cc", "-c", "a.c", "-o", "out/a.o"], host_root=True)
            captured = sandbox.capture()

The input root lies below an overlayfs (`casfs.projection`) whose upper layer is
a scratch directory, so writes are native and inputs never change. All mounts
are made in the mount namespace that `enter_namespace` made: they vanish with
this process, however it ends, and so does the command: by bubblewrap's
--die-with-parent, and where that comes too early by a guard (`casfs.orphans`).
What can stay is scratch, which the next `Sandboxes` clears.

A `Sandboxes` keeps warm what its sandboxes share, so a program that opens many
has one. They may be opened and used from different threads, each from one;
`run` must be called by a thread that lives until it returns.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from casfs import bubblewrap
from casfs.bubblewrap import PLACE, TEMPORARY, Watcher
from casfs.capture import Captured, Taken, capture, check_output_paths, take
from casfs.devices import Devices
from casfs.errors import MissingCapability, SandboxError
from casfs.guarding import Guard
from casfs.host_view import HostViews
from casfs.layers import Layouts
from casfs.networks import Networks
from casfs.projection import Projection, Projector
from casfs.scratch import Scratch, ScratchSpace
from casfs.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MS_REC,
    MS_SLAVE,
    has_admin_capability,
    mount,
    unshare,
)
from store.digest import Digest
from store.entries import DirectoryEntry, SymlinkEntry, printable
from store.errors import BadName
from store.ingest import Ingest
from store.repository import Store
from store.trees import Row, find_along, get_directory

log = logging.getLogger("casfs")


def enter_namespace(*, privileged: bool | None = None) -> None:
    """Take this process into a mount namespace of its own, with a user namespace where it has no privilege.

    `privileged`: whether it has; found out if not said. Once, before the
    process starts its second thread. Raises MissingCapability.
    """
    user, group = os.getuid(), os.getgid()
    privileged = has_admin_capability() if privileged is None else privileged
    try:
        unshare(CLONE_NEWNS if privileged else CLONE_NEWNS | CLONE_NEWUSER)
    except OSError as error:
        raise MissingCapability(
            f"sandboxes need {'a mount namespace' if privileged else 'a user namespace'}, and the kernel refuses one "
            f"({error.strerror}): see the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone and "
            "kernel.apparmor_restrict_unprivileged_userns, or run as root"
        ) from error
    try:
        if not privileged:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        # Ours are seen by nobody; what the host unmounts goes here, too, and isn't kept alive.
        mount("none", "/", "", MS_REC | MS_SLAVE, "")
    except OSError as error:
        raise MissingCapability(
            f"this user's user namespaces have no privilege in them ({error.strerror}): the sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0 would allow it, or run as root"
        ) from error


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended: its exit code (128 and the signal's number for a signal), and its time in seconds.

    `timed_out`: it was killed. `disk_full`: scratch had no room left when it ended. `stopped`: its watcher ended it.
    `begun`: there was such a command. `cpu` in seconds and `memory` (bytes of its largest process) are known to a
    process that adopts orphans.
    """

    code: int
    seconds: float
    timed_out: bool = False
    disk_full: bool = False
    stopped: bool = False
    begun: bool = True
    cpu: float = 0.0
    memory: int = 0


class Sandboxes:
    """Opens sandboxes on the trees of one store; `close` waits until the last of them is taken away."""

    def __init__(
        self,
        store: Store,
        *,
        scratch: Path | None = None,
        engine: str = "auto",
        layouts: Layouts | None = None,
        volatile: bool = True,
        guard: Guard | None = None,
    ) -> None:
        """`scratch` is where scratch directories are made, else beside the blobs.

        From there outputs enter the store without a copy. `layouts`: where
        engine kernel gets its layers from, if they shall not be of this
        process. `volatile`: nothing of scratch is synced to the disk. `guard`
        ends commands if this process is killed (`casfs.orphans`). Raises
        MissingCapability, SandboxError.
        """
        self.store = store
        self.projector = Projector(store, engine, layouts)
        self._space = ScratchSpace((scratch or store.layout.root / "scratch").absolute())
        if guard is not None:
            guard.note(os.fsencode(self._space.directory))
        self._volatile = volatile
        self.host_views = HostViews(self._space.directory)
        self.devices = Devices(self._space.directory)
        self.networks = Networks()
        # Unmounting waits for the kernel to be sure that nobody looks, several milliseconds: not the next action's.
        self._closer = ThreadPoolExecutor(1, "close-sandbox")

    def open(self, root: Digest, *, outputs: Iterable[bytes] = (), trace: Path | None = None) -> Sandbox:
        """A sandbox with the interned tree `root`; the parents of `outputs` are made.

        `trace` is a file that gets to know who uses what of the tree, complete
        when the sandbox is gone (`Sandboxes.wait_closed`). Raises BadName for an
        output outside of the tree, MissingCapability, MountError,
        SandboxError, StoreError.
        """
        paths = check_output_paths(outputs)
        with ExitStack() as parts:
            parts.enter_context(self.store.leases.acquire("sandbox", [root], str(self._space.base)))
            scratch = self._space.new()
            parts.callback(scratch.close)
            _make_parents(self.store, root, paths, scratch.upper)
            tracing = None
            if trace is not None:
                from casfs.tracing import Tracing

                tracing = Tracing(trace, paths)
            projection = self.projector.project(root, scratch, volatile=self._volatile, trace=tracing)
            parts.callback(projection.close)
            return Sandbox(self, root, paths, scratch, projection, parts.pop_all())

    def retire(self, parts: ExitStack) -> None:
        """Close what a sandbox was made of, in the background."""
        self._closer.submit(_close_logged, parts)

    def wait_closed(self) -> None:
        """Until all that was closed so far is gone."""
        self._closer.submit(int).result()

    def close(self) -> None:
        """Take everything away; the sandboxes must have been closed. Harmless when repeated."""
        self._closer.shutdown(wait=True)
        self.projector.close()
        self.networks.close()
        self.devices.close()
        self.host_views.close()
        self._space.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_logged(parts: ExitStack) -> None:
    try:
        parts.close()
    except Exception:
        log.exception("closing a sandbox")


def _make_parents(store: Store, root: Digest, outputs: Iterable[bytes], upper: Path) -> None:
    """Make the directories above outputs, in the upper layer: where the inputs have them too, they merge."""
    made = {b""}
    with store.index.view() as view:
        top = get_directory(view, root).id
        for path in outputs:
            # An action may have many thousand outputs, in few directories.
            if (parent := path.rpartition(b"/")[0]) not in made:
                _make_directories(path, parent, list(find_along(view, top, parent)), upper, made)


def _make_directories(path: bytes, parent: bytes, rows: Sequence[Row], upper: Path, made: set[bytes]) -> None:
    """Those on the way to `parent`, but for those that were `made`; `rows` is what the inputs have of them."""
    above = b""
    for depth, name in enumerate(parent.split(b"/")):
        above = above + b"/" + name if above else name
        if above in made:
            continue
        made.add(above)
        entry = rows[depth].entry if depth < len(rows) else None
        if isinstance(entry, SymlinkEntry):
            raise BadName(f"output {printable(path)} is behind the symbolic link {printable(above)} of the input root")
        if not isinstance(entry, DirectoryEntry | None):
            raise BadName(f"output {printable(path)}: {printable(above)} is an input file")
        try:
            with suppress(FileExistsError):
                os.mkdir(os.path.join(os.fsencode(upper), above), 0o755)
        except OSError as error:
            raise SandboxError(f"can't make the parents of output {printable(path)}: {error.strerror}") from error


class Sandbox:
    """One input root with scratch over it; made by `Sandboxes.open`, and `close` takes it away."""

    def __init__(
        self,
        owner: Sandboxes,
        root: Digest,
        outputs: list[bytes],
        scratch: Scratch,
        projection: Projection,
        parts: ExitStack,
    ) -> None:
        self._owner = owner
        self.root = root
        self._outputs = outputs
        self.scratch = scratch
        self.projection = projection
        self._parts = parts
        self._closed = False

    def run(
        self,
        command: Sequence[str | bytes],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        timeout: float | None = None,
        network: bool = False,
        host_root: bool = False,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        exactly: bool = False,
        watcher: Watcher | None = None,
    ) -> Finished:
        """Run a command and wait until it, and everything it started, has ended.

        It sees the input root at `PLACE` (its working directory, or
        `directory` below it), /proc, a minimal /dev, an empty /tmp and
        /dev/shm, and with `host_root` the host's directories; all else is read-only. The environment is what
        is given, and HOME and PATH if not `exactly`; bubblewrap adds PWD.
        `watcher` looks after it. Raises MissingCapability without bubblewrap,
        SandboxError.
        """
        view = self._owner.host_views.find(network) if host_root else ""
        environment = environment or {}
        # For a single command, which has no view, these would cost what they save.
        with (
            self._owner.devices.lend() if view else nullcontext("") as devices,
            self._owner.networks.enter() if view and not network else nullcontext(False) as apart,
        ):
            words: list[str] = [*bubblewrap.command_line(network, host_root, view, devices, apart)]
            words += ["--bind", str(self.scratch.merged), PLACE]
            if not view:
                # As a view is: whether there is one yet shall make no difference.
                words += ["--remount-ro", "/"]
            words += ["--chdir", os.path.join(PLACE, directory) if directory else PLACE]
            ended = bubblewrap.run(
                words,
                command,
                environment if exactly else _environment(environment, host_root),
                timeout=timeout,
                watcher=watcher,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        return Finished(
            ended.code,
            ended.seconds,
            ended.timed_out,
            self.scratch.is_full(),
            ended.stopped,
            ended.begun,
            ended.cpu,
            ended.memory,
        )

    def capture(self) -> Captured:
        """Bring the declared outputs into the store, and report what else changed. Raises StoreError, OSError."""
        return capture(self._owner.store, self.scratch.upper, self.scratch.merged, self.root, self._outputs)

    def take(self, ingest: Ingest) -> Taken:
        """The same into a session of the caller's, whose flush makes it durable; no tree is made of the outputs."""
        store, scratch = self._owner.store, self.scratch
        return take(store, scratch.upper, scratch.merged, self.root, self._outputs, ingest)

    def close(self) -> None:
        """Have everything taken away, in the background; harmless when repeated."""
        if not self._closed:
            self._closed = True
            self._owner.retire(self._parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(wanted: Mapping[str, str], host_root: bool) -> dict[str, str]:
    return {"HOME": TEMPORARY, "PATH": "/usr/bin:/bin" if host_root else PLACE, **wanted}
