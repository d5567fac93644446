"""What this machine can do for casfs, each thing found out by trying it.

Leaves nothing behind: files are made in a temporary directory where the blobs
would lie (whether passthrough and reflinks work depends on that file system)
and removed again; mounts end with the probe's process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from casfs.fusemount import DEVICE, find_device_problem
from casfs.mountinfo import mount_of
from casfs.probes import Probe, probe_mount, probe_passthrough, probe_pyfuse3
from casfs.sandbox_probe import probe_bubblewrap, probe_layers, probe_user_layers, probe_user_overlay
from casfs.syscalls import has_admin_capability, open_cached
from store.errors import StoreError
from store.kernel import try_clone
from store.repository import Store


@dataclass(frozen=True, slots=True)
class Finding:
    """One capability: whether it is there, how that was found out, what was seen, and what would help."""

    name: str
    ok: bool
    how: str
    detail: str
    remedy: str = ""


def examine(store_root: Path) -> list[Finding]:
    """Everything casfs can use, for a store in that directory, which need not exist. Raises nothing."""
    findings = [
        _examine_device(),
        _examine_helper(),
        _examine_store(store_root),
        _examine_cores(),
        _finding("engine kernel", "a file read through an overlay with a data-only layer", probe_layers()),
        _finding("kernel sandbox", "the same in a user namespace, with no privilege", probe_user_layers()),
    ]
    try:
        with _scratch_near(store_root) as scratch:
            directory = Path(scratch)
            file = directory / "file"
            file.write_bytes(os.urandom(8192))
            findings += [
                _finding("mount", "a mount and a read through it", probe_mount(file)),
                _finding(
                    "engine passthrough",
                    "FUSE_DEV_IOC_BACKING_OPEN on a file beside the blobs, and a read",
                    probe_passthrough(file),
                ),
                _finding("engine fuse", "import pyfuse3", probe_pyfuse3()),
                _finding("bubblewrap", "a command in namespaces of its own", probe_bubblewrap()),
                _finding("user overlay", "overlayfs with scratch, in a user namespace", probe_user_overlay(directory)),
                _examine_reflink(directory, file),
                _examine_cached_lookup(file),
            ]
    except OSError as error:
        findings.append(
            Finding(
                "probes", False, "a temporary file", f"can't make one: {error}", "free some space or fix its rights"
            )
        )
    findings.append(_choice(findings))
    return findings


def _finding(name: str, how: str, probe: Probe) -> Finding:
    return Finding(name, probe.ok, how, probe.detail, probe.remedy)


def _scratch_near(store_root: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory on the file system of the store, if this user can write there."""
    near = _existing(store_root)
    return tempfile.TemporaryDirectory(dir=near if os.access(near, os.W_OK) else None, prefix=".casfs-doctor-")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.is_dir())


def _examine_device() -> Finding:
    how = f"open {DEVICE}"
    if problem := find_device_problem():
        return Finding("fuse device", False, how, *problem)
    return Finding("fuse device", True, how, "opened for reading and writing")


def _examine_helper() -> Finding:
    how = "CAP_SYS_ADMIN of this process, else fusermount3 on the PATH"
    if has_admin_capability():
        return Finding("privilege to mount", True, how, "this process has CAP_SYS_ADMIN")
    helper = shutil.which("fusermount3")
    if helper is None:
        return Finding("privilege to mount", False, how, "neither", "apt-get install fuse3 (as root)")
    return Finding("privilege to mount", True, how, f"mounts are made by {helper}, and are for this user only")


def _examine_store(store_root: Path) -> Finding:
    how = "open it"
    near = _existing(store_root)
    kind = mount_of(near).kind
    place = f"{store_root} on {kind}, {shutil.disk_usage(near).free / 2**30:.1f} GiB free"
    try:
        with Store.open(store_root, create=False):
            return Finding("store", True, how, place)
    except StoreError as error:
        if not store_root.exists() and os.access(near, os.W_OK):
            return Finding("store", True, how, f"{place}; there is none yet, the first 'casfs add' makes it")
        return Finding("store", False, how, str(error), "choose another place with --store or CASFS_STORE")


def _examine_cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores}: the native session polls in bursts" if cores > 1 else "1: the native session never polls"
    return Finding("cores", True, "sched_getaffinity", detail)


def _examine_reflink(directory: Path, file: Path) -> Finding:
    how = "FICLONE between two files beside the blobs"
    with open(file, "rb") as source, open(directory / "clone", "wb") as target:
        if try_clone(source.fileno(), target.fileno()):
            return Finding("reflink", True, how, "files enter the store and leave it without being copied")
    return Finding("reflink", False, how, "this file system can't: files are copied", "put the store on btrfs or XFS")


def _examine_cached_lookup(file: Path) -> Finding:
    how = "openat2 with RESOLVE_CACHED"
    try:
        os.close(open_cached(str(file), os.O_RDONLY, -100))
    except OSError as error:
        return Finding(
            "cached lookups", False, how, f"{error.strerror}: every open takes a thread", "Linux 5.12 or newer"
        )
    return Finding("cached lookups", True, how, "an open of what is in the caches never leaves the loop")


def _choice(findings: list[Finding]) -> Finding:
    """What `auto` takes, given these findings."""
    able = {finding.name for finding in findings if finding.ok}
    if "engine kernel" in able:
        return Finding("auto", True, "the first engine that can", "kernel")
    for engine in ("passthrough", "fuse"):
        if f"engine {engine}" in able and "mount" in able:
            return Finding("auto", True, "the first engine that can", engine)
    if "mount" in able:
        return Finding("auto", True, "the first engine that can", "native", "pip install 'casfs[fuse]'")
    return Finding("auto", False, "the first engine that can", "none: nothing can be mounted", "see above")
