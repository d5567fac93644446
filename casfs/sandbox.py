"""Writable sandboxes: an input root, host scratch over it, one command at a time in namespaces of its own.

    enter_namespace()                      # once, in a process with one thread
    with Sandbox.open(store, root, outputs=[b"out/a.o"]) as sandbox:
        finished = sandbox.run(["cc", "-c", "a.c", "-o", "out/a.o"], host_root=True)
        captured = sandbox.capture()

The input root is the read-only lower layer of an overlayfs (`casfs.projection`),
its upper layer is a scratch directory, so writes are native and inputs never
change. All mounts are made in the mount namespace that `enter_namespace` made:
they vanish with this process, however it ends, and so does the command
(bubblewrap's --die-with-parent). What can stay is scratch, which the next
`Sandbox.open` clears.

Sandboxes may be opened and used from different threads, each from one; `run`
must be called by a thread that lives until it returns.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from casfs.capture import Captured, capture, check_output_paths, find_symlink_above
from casfs.errors import MissingCapability, SandboxError
from casfs.projection import Projection, project
from casfs.scratch import Scratch, clear_leftovers
from casfs.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
    has_admin_capability,
    mount,
    umount,
    unshare,
)
from store.digest import Digest
from store.entries import printable
from store.errors import BadName
from store.repository import Store

PLACE = "/build"
"""Where a command finds its input root, and begins."""

_TEMPORARY = "/tmp"  # noqa: S108 - the sandbox's own
_NOT_FROM_HOST = {"proc", "dev", "tmp", "sys", "run", PLACE.lstrip("/")}
"""What of the host's root is never shown: what the sandbox has of its own, and sockets of services."""


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

    `timed_out`: it was killed. `disk_full`: scratch had no room left when it ended.
    """

    code: int
    seconds: float
    timed_out: bool = False
    disk_full: bool = False


class Sandbox:
    """One input root with scratch over it; `open` makes it, `close` takes it away."""

    def __init__(self, store: Store, root: Digest, outputs: list[bytes]) -> None:
        """For `open`."""
        self._store = store
        self.root = root
        self._outputs = outputs
        self._parts = ExitStack()
        self.scratch: Scratch
        self.projection: Projection

    @classmethod
    def open(
        cls,
        store: Store,
        root: Digest,
        *,
        outputs: Iterable[bytes] = (),
        scratch: Path | None = None,
        engine: str = "auto",
        volatile: bool = True,
    ) -> Self:
        """A sandbox with the interned tree `root`; the parents of `outputs` are made.

        `scratch` is where its scratch directory is made, else beside the blobs,
        from where outputs enter the store without a copy. `volatile`: nothing
        of scratch is synced to the disk. Raises BadName for an output outside
        of the tree, MissingCapability, MountError, SandboxError, StoreError.
        """
        sandbox = cls(store, root, check_output_paths(outputs))
        base = (scratch or store.layout.root / "scratch").absolute()
        clear_leftovers(base)
        try:
            sandbox._build(base, engine, volatile)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def _build(self, base: Path, engine: str, volatile: bool) -> None:
        self._parts.enter_context(self._store.leases.acquire("sandbox", [self.root], str(base)))
        self.scratch = Scratch(base)
        self._parts.callback(self.scratch.close)
        self.projection = project(self._store, self.root, self.scratch.lower, engine)
        self._parts.callback(self.projection.close)
        for path in self._outputs:
            self._make_parents(path)
        mount_writable(self.scratch, volatile=volatile)
        self._parts.callback(umount, str(self.scratch.merged), MNT_DETACH)

    def _make_parents(self, path: bytes) -> None:
        """Make the directories above an output, in the upper layer: where the inputs have them too, they merge."""
        link = find_symlink_above(self.scratch.lower, path)
        if link is not None:
            raise BadName(f"output {printable(path)} is behind the symbolic link {printable(link)} of the input root")
        parent, upper, lower = (
            path.rpartition(b"/")[0],
            os.fsencode(self.scratch.upper),
            os.fsencode(self.scratch.lower),
        )
        if not parent:
            return
        components = parent.split(b"/")
        for depth in range(1, len(components) + 1):
            above = b"/".join(components[:depth])
            if os.path.lexists(os.path.join(lower, above)) and not os.path.isdir(os.path.join(lower, above)):
                raise BadName(f"output {printable(path)}: {printable(above)} is an input file")
            try:
                with suppress(FileExistsError):
                    os.mkdir(os.path.join(upper, above), 0o755)
            except OSError as error:
                raise SandboxError(f"can't make the parents of output {printable(path)}: {error.strerror}") from error

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
    ) -> Finished:
        """Run a command and wait until it, and everything it started, has ended.

        It sees the input root at `PLACE` (its working directory, or
        `directory` below it), /proc, a minimal /dev, an empty /tmp, and with
        `host_root` the host's directories, read-only. The environment is what
        is given and no more. Raises MissingCapability without bubblewrap.
        """
        began = time.monotonic()
        words = [*_bubblewrap(network, host_root), "--bind", str(self.scratch.merged), PLACE]
        words += ["--chdir", os.path.join(PLACE, directory)]
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [*words, "--info-fd", str(writing), "--", *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=_environment(environment or {}, host_root),
                pass_fds=[writing],
                cwd="/",
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        timed_out = False
        first: int | None = None
        with open(reading, "rb") as info, process:
            try:
                first = _first_process(info.read())
                try:
                    code = process.wait(timeout)
                except subprocess.TimeoutExpired:
                    timed_out, code = True, 124
            finally:
                # Ends what still runs; a no-op after an ordinary end.
                process.kill()
                _wait_ended(first)
        return Finished(code, time.monotonic() - began, timed_out, self.scratch.is_full())

    def capture(self) -> Captured:
        """Bring the declared outputs into the store, and report what else changed. Raises StoreError, OSError."""
        scratch = self.scratch
        return capture(self._store, scratch.upper, scratch.merged, scratch.lower, self._outputs, self.root.function)

    def close(self) -> None:
        """Take everything away; harmless when repeated."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mount_writable(scratch: Scratch, *, volatile: bool) -> None:
    """Mount ``upper`` over ``lower`` at ``merged``. Raises MissingCapability.

    Paths are given as descriptors: in overlayfs's option text a comma or a
    colon would end them.
    """
    # With userxattr there is neither metacopy nor redirect_dir: what is copied up is copied whole.
    options = "userxattr,index=off" + (",volatile" if volatile else "")
    with _opened(scratch) as (lower, upper, work):
        paths = f"lowerdir=/proc/self/fd/{lower},upperdir=/proc/self/fd/{upper},workdir=/proc/self/fd/{work}"
        try:
            mount("casfs-sandbox", str(scratch.merged), "overlay", MS_NOSUID | MS_NODEV, f"{paths},{options}")
        except OSError as error:
            raise MissingCapability(
                f"overlayfs can't use {scratch.directory} as scratch ({os.strerror(error.errno or 0)}): it must be on "
                "a file system with user xattrs that is no overlay itself (ext4, XFS, btrfs, tmpfs of Linux 6.6), "
                "and without root Linux 5.11 is needed; --scratch names another place"
            ) from error


@contextmanager
def _opened(scratch: Scratch) -> Iterator[list[int]]:
    with ExitStack() as stack:
        descriptors = []
        for path in (scratch.lower, scratch.upper, scratch.work):
            descriptors.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        yield descriptors


def _bubblewrap(network: bool, host_root: bool) -> list[str]:
    """The beginning of its command line: everything but the input root and the command."""
    program = shutil.which("bwrap")
    if program is None:
        raise MissingCapability("running a command needs bubblewrap: install the Debian package bubblewrap")
    words = [program, "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--hostname", "casfs"]
    words += ["--die-with-parent", "--new-session"]
    if os.getuid() == 0:
        words += ["--cap-drop", "ALL"]
    # Who wrote a directory's mode shall not matter: everything is the action's to write, in its own scratch.
    words += ["--cap-add", "CAP_DAC_OVERRIDE"]
    if not network:
        words.append("--unshare-net")
    if host_root:
        for name in sorted(set(os.listdir("/")) - (_NOT_FROM_HOST - {"run"} if network else _NOT_FROM_HOST)):
            path = f"/{name}"
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                words += ["--ro-bind-try", path, path]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--tmpfs", _TEMPORARY]


def _environment(wanted: Mapping[str, str], host_root: bool) -> dict[str, str]:
    return {"HOME": _TEMPORARY, "PATH": "/usr/bin:/bin" if host_root else PLACE, **wanted}


def _first_process(info: bytes) -> int | None:
    """A descriptor of the first process of bubblewrap's pid namespace, or None where it never came to be."""
    with suppress(ValueError, KeyError, OSError):
        return os.pidfd_open(json.loads(info)["child-pid"])
    return None


def _wait_ended(first: int | None) -> None:
    """Wait until that process is gone: the kernel has then ended all others of its namespace.

    bubblewrap itself returns when the command ends, which may have left
    processes behind that still write.
    """
    if first is not None:
        with open(first, "rb", buffering=0):
            select.select([first], [], [], 10)
