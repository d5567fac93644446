"""Overlayfs over metadata layers: names from one file system, bytes from files of another, no process in between.

A metadata layer's regular files are empty; two xattrs of each say where its
bytes are: ``metacopy`` (that it has none of its own) and ``redirect`` (their
path in a *data-only* layer, which is never listed). The kernel then serves
names and attributes from the one and bytes from the other.

The xattrs come in two families, and each wants its mount option: with the
wrong one the kernel shows the empty files of the layer as they are, full of
zeros. So the family is found out by reading a file, and who mounts reads one
of the mount's own (`verify`).

Several layers: a redirect is looked up in the ordinary layers below before the
data-only ones, and with `user` xattrs is refused there. So of a stack only the
lowest layer has redirects of its own; what lies above it is an overlay by
itself, of one layer and the same data. Then no name of a tree can be taken for
a redirect, in either family.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from casfs.errors import MissingCapability, MountError
from casfs.newmount import NO_DEV, NO_SUID, READ_ONLY, FileSystemContext
from store.digest import Digest
from store.entries import PATH_MAX, FileEntry, ReferenceEntry, printable
from store.layout import blob_path_in_function
from store.trees import Directory

_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Names:
    metacopy: str
    redirect: str


class Family(Enum):
    """Which xattrs a layer has.

    USER needs no privilege beyond a user namespace, and Linux 6.16 for data-only
    layers; TRUSTED needs root, and Linux 6.5.
    """

    USER = _Names("user.overlay.metacopy", "user.overlay.redirect")
    TRUSTED = _Names("trusted.overlay.metacopy", "trusted.overlay.redirect")

    def configure(self, context: FileSystemContext) -> None:
        """The mount options that make overlayfs look at these xattrs."""
        if self is Family.USER:
            context.set_flag("userxattr")
        else:
            context.set_string("metacopy", "on")
            context.set_string("redirect_dir", "on")


@dataclass(frozen=True, slots=True)
class Upper:
    """What makes a stack writable: descriptors of its upper and its work directory, on one file system.

    `volatile`: nothing is synced to the disk, whatever programs ask for.
    """

    directory: int
    work: int
    volatile: bool = True


def new_tmpfs(source: str = "casfs") -> int:
    """An empty tmpfs that is attached nowhere: a descriptor of its root."""
    with FileSystemContext("tmpfs") as context:
        context.set_string("source", source)
        context.set_string("mode", "0755")
        return context.mount(NO_SUID | NO_DEV)


def stack(
    layers: Sequence[int], data: Sequence[int], family: Family, source: str = "casfs", upper: Upper | None = None
) -> int:
    """A mount, attached nowhere, of layers (the uppermost first) over directories with their files' bytes.

    The lowest layer is one of metadata, those above are overlays of their own.
    Read-only without `upper`. `source` is what /proc/self/mountinfo shows.
    """
    with FileSystemContext("overlay") as context:
        family.configure(context)
        context.set_string("source", source)
        for layer in layers:
            context.set_descriptor("lowerdir+", layer)
        for directory in data:
            context.set_descriptor("datadir+", directory)
        if upper is None:
            return context.mount(READ_ONLY | NO_SUID | NO_DEV)
        context.set_descriptor("upperdir", upper.directory)
        context.set_descriptor("workdir", upper.work)
        context.set_string("index", "off")
        if upper.volatile:
            context.set_flag("volatile")
        return context.mount(NO_SUID | NO_DEV)


def check_showable(directory: Directory) -> None:
    """Raise MissingCapability for a tree with files by reference: their bytes are in no blob directory."""
    if directory.references:
        raise MissingCapability(
            f"{directory.references} files of this tree are by reference, which engine kernel can't show: "
            "use --engine passthrough or fuse"
        )


def redirect_of(entry: FileEntry | ReferenceEntry) -> bytes:
    """Where the blob of a file is, as an absolute path in the directory of its function's shards.

    ValueError for a file by reference: see `check_showable`.
    """
    if isinstance(entry, ReferenceEntry):
        raise ValueError(f"{printable(entry.name)} is a file by reference: its bytes are in no blob directory")
    return b"/" + blob_path_in_function(entry.digest.hash)


def verify(samples: Iterable[tuple[bytes, Digest]], blobs: int, mounted: int) -> None:
    """Read a file through a mount and compare it with its blob: a mount set up wrongly shows zeros, and no error.

    `samples` are paths below the mount (a descriptor) and what they should have;
    the first that doesn't begin with zeros decides. `blobs` is the directory of
    their function's shards. Raises MountError.
    """
    for path, digest in samples:
        if len(path) >= PATH_MAX:
            continue  # to be reached step by step only
        wanted = _read_some(blob_path_in_function(digest.hash), blobs)
        if _read_some(path, mounted) != wanted:
            raise MountError(f"{printable(path)} has other bytes through the mount than its blob {digest} has")
        if wanted.strip(b"\0"):
            return


def _read_some(path: bytes, directory: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(descriptor, _SAMPLE_BYTES)
    finally:
        os.close(descriptor)


def write_file(
    directory: int, name: bytes, family: Family, redirect: bytes, size: int, mode: int, mtime_ns: int
) -> None:
    """A file of a metadata layer, on a file system that is being filled; with the umask taken off its mode."""
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        if size:  # else it is all there is, and its blob need not exist
            names = family._value_  # as `value`, which is a call into Python for each file
            os.ftruncate(descriptor, size)
            os.setxattr(descriptor, names.metacopy, b"")
            os.setxattr(descriptor, names.redirect, redirect)
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(descriptor)


@cache
def find_family() -> Family:
    """The family to use by this process, found out by reading a file. Raises MissingCapability where neither works."""
    failure = "overlayfs served zeros in place of a file's bytes"
    for family in Family:
        try:
            if _serves(family):
                return family
        except OSError as error:
            failure = error.strerror or str(error)
    raise MissingCapability(
        "engine kernel needs CAP_SYS_ADMIN (in a user namespace, Linux 6.16) and an overlayfs with data-only layers "
        f"(Linux 6.13): {failure}; use --engine passthrough or fuse"
    )


def _serves(family: Family) -> bool:
    content = b"what the file has"
    descriptors = [new_tmpfs(), new_tmpfs()]
    metadata, data = descriptors
    try:
        with open(os.open("blob", os.O_CREAT | os.O_WRONLY, 0o444, dir_fd=data), "wb") as file:
            file.write(content)
        write_file(metadata, b"file", family, b"/blob", len(content), 0o444, 0)
        descriptors.append(stack([metadata], [data], family))
        with open(os.open("file", os.O_RDONLY, dir_fd=descriptors[-1]), "rb") as file:
            return file.read() == content
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
