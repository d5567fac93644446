"""Attaching a FUSE connection to a place, and taking it off: mount(2) with privilege, fusermount3 without."""

from __future__ import annotations

import array
import errno
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from casfs.errors import Busy, MissingCapability, MountError, NotMounted
from casfs.mountinfo import FUSE_TYPE, find_mount
from casfs.newmount import NO_DEV, NO_SUID, READ_ONLY, FileSystemContext
from casfs.syscalls import (
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    UMOUNT_NOFOLLOW,
    has_admin_capability,
    mount,
    umount,
)

DEVICE = "/dev/fuse"
_DEVICE_NUMBER = os.makedev(10, 229)
SOURCE = "casfs"
"""What `mount` and `df` show as the source."""


class DeviceProblem(NamedTuple):
    """Why this user can't use the FUSE device, and what would help."""

    reason: str
    remedy: str


def find_device_problem() -> DeviceProblem | None:
    """What is wrong with the FUSE device for this user, or None."""
    get_it = f"load the fuse module (modprobe fuse), or give this container the device {DEVICE}"
    try:
        status = os.stat(DEVICE)
    except OSError:
        return DeviceProblem(f"there is no {DEVICE}", get_it)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _DEVICE_NUMBER:
        return DeviceProblem(f"{DEVICE} is not the FUSE device", get_it)
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # fusermount3 opens it with the rights of the user, too.
        return DeviceProblem(f"this user can't open {DEVICE}: {error.strerror}", f"as root: chmod 666 {DEVICE}")
    return None


def attach(mountpoint: Path) -> int:
    """Mount a new FUSE file system, read-only, nosuid, nodev; returns the descriptor of its connection.

    Nothing answers until a session serves it. Raises MissingCapability where
    there is no FUSE device or no way for this user to mount, MountError.
    """
    if problem := find_device_problem():
        raise MissingCapability(f"can't mount: {problem.reason}; {problem.remedy}")
    if has_admin_capability():
        return _attach_directly(mountpoint)
    return _attach_with_helper(mountpoint)


def make_unattached() -> tuple[int, int]:
    """A new FUSE file system that is mounted nowhere: descriptors of its connection and of its root.

    It lasts as long as a descriptor or a mount of it. Raises MissingCapability.
    """
    if problem := find_device_problem():
        raise MissingCapability(f"can't mount: {problem.reason}; {problem.remedy}")
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        with FileSystemContext("fuse") as context:
            context.set_string("source", SOURCE)
            context.set_string("fd", str(device))
            context.set_string("rootmode", "40000")
            context.set_string("user_id", str(os.getuid()))
            context.set_string("group_id", str(os.getgid()))
            context.set_flag("default_permissions")
            context.set_flag("allow_other")
            return device, context.mount(READ_ONLY | NO_SUID | NO_DEV)
    except OSError as error:
        os.close(device)
        raise MissingCapability(f"this user can't make a FUSE file system here: {error.strerror}") from error


def _attach_directly(mountpoint: Path) -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions,allow_other"
    try:
        mount(SOURCE, str(mountpoint), FUSE_TYPE, MS_RDONLY | MS_NOSUID | MS_NODEV, options)
    except OSError as error:
        os.close(device)
        if error.errno == errno.EPERM:
            raise MissingCapability(f"this user may not mount (no CAP_SYS_ADMIN): {error}") from error
        raise MountError(f"can't mount on {mountpoint}: {os.strerror(error.errno or 0)}") from error
    return device


def _attach_with_helper(mountpoint: Path) -> int:
    """fusermount3 mounts and sends the descriptor back over a socket (libfuse's protocol)."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise MissingCapability("mounting without root needs fusermount3: install the Debian package fuse3")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", f"ro,nosuid,nodev,default_permissions,fsname={SOURCE},subtype=casfs", "--", str(mountpoint)],
            check=False,
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        if done.returncode:
            raise MountError(f"can't mount on {mountpoint}: {done.stderr.strip() or 'fusermount3 failed'}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            device = array.array("i", data[:4])[0]
            os.set_inheritable(device, False)
            return device
    raise MountError(f"can't mount on {mountpoint}: fusermount3 sent no descriptor")


def detach(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount the casfs mount at that place, whether its daemon lives or not.

    `lazy` takes the name away now and the file system when it is no longer in
    use. Raises NotMounted, Busy, MountError.
    """
    found = find_mount(str(mountpoint))
    if found is None or not found.is_casfs:
        raise NotMounted(f"there is no casfs mount at {mountpoint}")
    if has_admin_capability():
        try:
            umount(str(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Busy(_busy(mountpoint)) from error
            raise MountError(f"can't unmount {mountpoint}: {os.strerror(error.errno or 0)}") from error
        return
    helper = shutil.which("fusermount3")
    if helper is None:
        raise MissingCapability("unmounting without root needs fusermount3: install the Debian package fuse3")
    command = [helper, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        if "busy" in done.stderr.lower():
            raise Busy(_busy(mountpoint))
        raise MountError(f"can't unmount {mountpoint}: {done.stderr.strip()}")


def _busy(mountpoint: Path) -> str:
    return f"{mountpoint} is in use: close what is open there ('fuser -m {mountpoint}' shows it), or use --lazy"
