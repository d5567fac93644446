"""Overlayfs over metadata layers: names from one file system, bytes from files of another, no process in between.

A metadata layer's regular files are empty; two xattrs of each say where its
bytes are: ``metacopy`` (that it has none of its own) and ``redirect`` (their
path in a *data-only* layer, which is never listed). The kernel then serves
names and attributes from the one and bytes from the other.

The xattrs come in two families, and each wants its mount option: with the
wrong one the kernel shows the empty files of the layer as they are, full of
zeros. So the family is found out by reading a file, and `verify` in
`casfs.kernel_engine` reads one of each mount.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from casfs.errors import MissingCapability
from casfs.newmount import NO_DEV, NO_SUID, READ_ONLY, FileSystemContext
from store.entries import FileEntry, ReferenceEntry, printable
from store.layout import blob_path


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


def new_tmpfs(source: str = "casfs") -> int:
    """An empty tmpfs that is attached nowhere: a descriptor of its root."""
    with FileSystemContext("tmpfs") as context:
        context.set_string("source", source)
        context.set_string("mode", "0755")
        return context.mount(NO_SUID | NO_DEV)


def stack(metadata: int, data: Sequence[int], family: Family, source: str) -> int:
    """A read-only mount, attached nowhere, of one metadata layer over directories with its files' bytes.

    `source` is what /proc/self/mountinfo shows. The layer is the only one, so a
    redirect is looked for in `data` alone: no name of a tree can be taken for it.
    """
    with FileSystemContext("overlay") as context:
        family.configure(context)
        context.set_string("source", source)
        context.set_descriptor("lowerdir+", metadata)
        for directory in data:
            context.set_descriptor("datadir+", directory)
        return context.mount(READ_ONLY | NO_SUID | NO_DEV)


def redirect_of(entry: FileEntry | ReferenceEntry) -> bytes:
    """Where the blob of a file is, as an absolute path in the blob directory.

    Raises MissingCapability for a file by reference: its bytes are in no blob directory.
    """
    if isinstance(entry, ReferenceEntry):
        raise MissingCapability(
            f"{printable(entry.name)} is a file by reference, which engine kernel can't show: "
            "use --engine passthrough or fuse"
        )
    return b"/" + blob_path(entry.digest).encode()


def write_file(
    directory: int, name: bytes, family: Family, redirect: bytes, size: int, mode: int, mtime_ns: int
) -> None:
    """A file of a metadata layer, on a file system that is being filled."""
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        if size:  # else it is all there is, and its blob need not exist
            os.ftruncate(descriptor, size)
            os.setxattr(descriptor, family.value.metacopy, b"")
            os.setxattr(descriptor, family.value.redirect, redirect)
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(descriptor)


def find_family() -> Family:
    """The family to use here, found out by reading a file. Raises OSError where neither works."""
    failure = OSError(0, "overlayfs served zeros in place of a file's bytes")
    for family in Family:
        try:
            if _serves(family):
                return family
        except OSError as error:
            failure = error
    raise failure


def _serves(family: Family) -> bool:
    content = b"what the file has"
    descriptors = [new_tmpfs(), new_tmpfs()]
    metadata, data = descriptors
    try:
        with open(os.open("blob", os.O_CREAT | os.O_WRONLY, 0o444, dir_fd=data), "wb") as file:
            file.write(content)
        write_file(metadata, b"file", family, b"/blob", len(content), 0o444, 0)
        descriptors.append(stack(metadata, [data], family, "casfs"))
        with open(os.open("file", os.O_RDONLY, dir_fd=descriptors[-1]), "rb") as file:
            return file.read() == content
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
