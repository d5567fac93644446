"""Whether this machine can have sandboxes, found out by making one. Leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import closing
from pathlib import Path

from casfs.overlay import find_family
from casfs.probes import Probe, in_child
from casfs.sandbox import enter_namespace
from casfs.scratch import Scratch, ScratchSpace
from casfs.served import mount_writable

_SECONDS = 10


def probe_bubblewrap() -> Probe:
    """Run a command with bubblewrap, in namespaces of its own."""
    program = shutil.which("bwrap")
    if program is None:
        return Probe(False, "bwrap is not installed", "apt-get install bubblewrap (as root)")
    command = [program, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Probe(False, str(error), "see whether 'bwrap --ro-bind / / true' works")
    if done.returncode:
        return Probe(False, done.stderr.strip() or f"exit code {done.returncode}", "allow user namespaces, or use root")
    return Probe(True, f"{program} ran a command")


def probe_layers() -> Probe:
    """Stack metadata over data, as this user is."""
    return in_child(_try_layers, "mount as root, on Linux 6.13 or later with overlayfs")


def probe_user_layers() -> Probe:
    """Stack metadata over data in a new user namespace of this user."""

    def attempt() -> Probe:
        enter_namespace(privileged=False)
        return _try_layers()

    remedy = "use Linux 6.16 or later; until then 'casfs run' as an ordinary user has a FUSE session below it"
    return in_child(attempt, remedy)


def _try_layers() -> Probe:
    return Probe(True, f"its bytes came, with xattrs of the family {find_family().name.lower()}")


def probe_user_overlay(directory: Path) -> Probe:
    """Write through an overlayfs with its scratch in `directory`, in a new user namespace of this user."""
    with closing(ScratchSpace(directory)) as space:
        scratch = space.new()
        return in_child(lambda: _try_overlay(scratch), "run sandboxes as root, on a kernel from 5.11 on")


def _try_overlay(scratch: Scratch) -> Probe:
    enter_namespace(privileged=False)
    scratch.lower.mkdir()
    mount_writable(scratch, volatile=True)
    (scratch.merged / "file").write_bytes(b"written")
    if (scratch.upper / "file").read_bytes() != b"written":
        return Probe(False, "what was written didn't come to the upper layer", "run sandboxes as root")
    return Probe(True, "a file was written through one, with no privilege")
