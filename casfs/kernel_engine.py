"""The kernel engine: a tree mounted with no process behind it, and no upcall for anything.

A metadata layer (in tmpfs, or an EROFS image kept in the store) has the names,
the blob directory has the bytes, overlayfs puts them together (`casfs.overlay`).
What a daemon would find out when a file is opened has to be known before: that
every blob is here and verified. The lease on the tree is held by the mount
itself (`store.leases`).

Needs CAP_SYS_ADMIN for a mount that others shall see.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from casfs.errors import MissingCapability, MountError
from casfs.images import find_image, mount_image, open_image
from casfs.metadata import write_tmpfs
from casfs.newmount import attach_mount
from casfs.overlay import Family, find_family, stack
from store.blobs import removals
from store.digest import Digest
from store.entries import FileEntry, printable
from store.errors import MissingBlob
from store.index import View
from store.layout import blob_path
from store.leases import mount_source
from store.manifests import LOOK_AT_MOST, tree_blobs
from store.repository import Store
from store.trees import Directory, find_directory, walk

_TMPFS_NODES = 2048
"""Up to so many nodes a layer is made anew in tmpfs (about 20 µs a node, with its checks); larger trees have an image,
which takes as long once and is mounted in a millisecond from then on."""
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 16


def mount_tree(store: Store, root: Digest, place: Path) -> None:
    """Mount the interned tree `root`, whose blobs are all here, at `place`.

    Raises MissingCapability for what this engine or this kernel can't do,
    MissingBlob, CorruptBlob, MountError.
    """
    lease = store.leases.acquire("mount", [root], str(place))
    try:
        # After the lease: from here on no collection takes anything of the tree.
        family = _find_family()
        directory, counted = _check(store, root, family)
        with ExitStack() as opened:
            metadata = _make_layer(store, directory, family, counted, opened)
            mounted = stack(metadata, [store.blobs.directory], family, mount_source(lease.info))
            opened.callback(os.close, mounted)
            with store.index.view() as view:
                samples = list(_some_files(view, directory))
            _verify(samples, store.blobs.directory, mounted)
            attach_mount(mounted, place)
    except OSError as error:
        lease.release()
        raise MountError(f"can't mount on {place}: {error.strerror or error}") from error
    except BaseException:
        lease.release()
        raise
    lease.leave_to_mount()


def _make_layer(store: Store, directory: Directory, family: Family, counted: int, opened: ExitStack) -> int:
    """A descriptor of the metadata layer's root, closed by `opened`."""
    if directory.nodes <= _TMPFS_NODES:
        with store.index.view() as view:
            metadata = write_tmpfs(view, directory, family)
    else:
        image = open_image(store, directory, family, counted)
        opened.callback(os.close, image)
        metadata = mount_image(image)
    opened.callback(os.close, metadata)
    return metadata


def _check(store: Store, root: Digest, family: Family) -> tuple[Directory, int]:
    """The interned directory, if this engine can show it, and where `removals` stood before its blobs were checked."""
    with store.index.view() as view:
        directory = find_directory(view, root)
        if directory is None:
            raise MountError(f"directory {root} is not in the index any more")
        if directory.references:
            raise MissingCapability(
                f"{directory.references} files of this tree are by reference, which engine kernel can't show: "
                "use --engine passthrough or fuse"
            )
        counted = removals(view)
        image = find_image(view, root, family)
        if image is not None and image.removals == counted:
            # Nothing was removed since all of it was here.
            return directory, counted
        blobs = list(tree_blobs(view, directory))
    # What has no row is hashed now, as nobody will when it is opened. Rows of small trees are not taken at their word.
    missing = store.blobs.missing(blobs)
    if len(blobs) <= LOOK_AT_MOST:
        missing = missing or [digest for digest in blobs if digest.size and not store.blobs.has_file(digest)]
    if missing:
        raise MissingBlob(
            f"{len(missing)} of {len(blobs)} blobs are not in {store.layout.root} (one is {missing[0]}): engine "
            "kernel has nobody to ask when they are opened; bring them in, or use --engine passthrough or fuse"
        )
    return directory, counted


def _find_family() -> Family:
    try:
        return find_family()
    except OSError as error:
        raise MissingCapability(
            f"engine kernel needs CAP_SYS_ADMIN and an overlayfs with data-only layers (Linux 6.13): "
            f"{error.strerror or error}; use --engine passthrough or fuse"
        ) from error


def _verify(samples: Iterable[tuple[bytes, Digest]], blobs: int, mounted: int) -> None:
    """Read a file through the mount and compare it with its blob: a mount set up wrongly shows zeros, and no error.

    Raises MountError.
    """
    for path, digest in samples:
        wanted = _read_some(blob_path(digest), blobs)
        if _read_some(path, mounted) != wanted:
            raise MountError(f"{printable(path)} has other bytes through the mount than its blob {digest} has")
        if wanted.strip(b"\0"):
            return


def _read_some(path: str | bytes, directory: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
        return file.read(_SAMPLE_BYTES)


def _some_files(view: View, directory: Directory) -> Iterator[tuple[bytes, Digest]]:
    files = ((path, entry.digest) for path, entry in walk(view, directory) if isinstance(entry, FileEntry))
    return islice(((path, digest) for path, digest in files if digest.size), _SAMPLES)
