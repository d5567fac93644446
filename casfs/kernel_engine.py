"""The kernel engine: a tree mounted with no process behind it, and no upcall for anything.

A metadata layer (in tmpfs, or an EROFS image kept in the store) has the names,
the blob directory has the bytes, overlayfs puts them together (`casfs.overlay`).
What a daemon would find out when a file is opened has to be known before: that
every blob is here and verified. The lease on the tree is held by the mount
itself (`store.leases`). Where blobs are missing, somebody who fetches them is
below the mount (`casfs.blob_mount`), and lives as long as it.

This is for mounts that others see, one layer each; sandboxes are stacked from
many (`casfs.layers`). Needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from casfs.blob_mount import BlobMount
from casfs.errors import MissingCapability, MountError
from casfs.images import NEVER_WHOLE, find_image, mount_image, open_image
from casfs.metadata import write_tmpfs
from casfs.newmount import attach_mount
from casfs.overlay import Family, Upper, check_showable, find_family, stack, verify
from casfs.planning import Subtree, plan_layer
from store.blobs import removals
from store.digest import Digest
from store.entries import FileEntry
from store.errors import CorruptBlob, MissingBlob
from store.index import View
from store.leases import mount_source
from store.manifests import LOOK_AT_MOST, tree_blobs
from store.repository import Store
from store.trees import Directory, get_directory, list_entries, walk

TMPFS_NODES = 2048
"""Up to so many nodes a layer is made anew in tmpfs (about 20 µs a node, with its checks); larger trees have an image,
which takes as long once and is mounted in a millisecond from then on."""
QUICK_NODES = 100_000
"""Up to so many nodes a tree's image is made without being asked for: about a second."""
_SAMPLES = 16


def mount_tree(
    store: Store, root: Digest, place: Path, *, fetching: BlobMount | None = None, upper: Upper | None = None
) -> None:
    """Mount the interned tree `root` at `place`.

    Without `fetching` no blob may be missing. With `upper` the mount can be written.
    Raises MissingCapability for what this engine or this kernel can't do,
    MissingBlob, CorruptBlob, MountError.
    """
    lease = store.leases.acquire("mount", [root], str(place))
    try:
        # After the lease: from here on no collection takes anything of the tree.
        family = find_family()
        directory, counted, missing = _check(store, root, family)
        if missing and fetching is None:
            raise MissingBlob(
                f"{len(missing)} blobs of the tree are not in {store.layout.root} (one is {next(iter(missing))})"
            )
        here = store.blobs.directory_of(root.function)
        data = [here]
        if missing and fetching is not None:
            with store.index.view() as view:
                fetching.expect((path, digest) for path, digest in _files(view, directory) if digest in missing)
            data.append(fetching.layer)
        with ExitStack() as opened:
            metadata = _make_layer(store, directory, family, counted, not missing, opened)
            mounted = stack([metadata], data, family, mount_source(lease.info), upper)
            opened.callback(os.close, mounted)
            with store.index.view() as view:
                files = (needed for needed in _files(view, directory) if needed[1] not in missing)
                samples = list(islice(files, _SAMPLES))
            verify(samples, here, mounted)
            attach_mount(mounted, place)
    except OSError as error:
        lease.release()
        raise MountError(f"can't mount on {place}: {error.strerror or error}") from error
    except BaseException:
        lease.release()
        raise
    lease.leave_to_mount()


def check_quick(store: Store, root: Digest) -> None:
    """Raise MissingCapability where mounting a tree would take long: it is large, and has no image yet."""
    with store.index.view() as view:
        directory = get_directory(view, root)
        check_showable(directory)
        subtree = Subtree(b"", root, directory.id, directory.nodes)
        if directory.nodes > QUICK_NODES and find_image(view, subtree, find_family()) is None:
            raise MissingCapability(
                f"its image of {directory.nodes:,} nodes would have to be made first; --engine kernel makes it, once"
            )


def _make_layer(
    store: Store, directory: Directory, family: Family, counted: int, whole: bool, opened: ExitStack
) -> int:
    """A descriptor of the metadata layer's root, closed by `opened`."""
    subtree = Subtree(b"", directory.digest, directory.id, directory.nodes)
    if directory.nodes <= TMPFS_NODES:
        with store.index.view() as view:
            planned = plan_layer(subtree, partial(list_entries, view))
        metadata = write_tmpfs(planned.parts, family)
    else:
        image = open_image(store, subtree, family, counted if whole else NEVER_WHOLE)
        opened.callback(os.close, image)
        metadata = mount_image(image)
    opened.callback(os.close, metadata)
    return metadata


def _check(store: Store, root: Digest, family: Family) -> tuple[Directory, int, set[Digest]]:
    """The interned directory, where `removals` stood before its blobs were looked for, and those that are missing."""
    with store.index.view() as view:
        directory = get_directory(view, root)
        check_showable(directory)
        counted = removals(view)
        image = find_image(view, Subtree(b"", root, directory.id, directory.nodes), family)
        if image is not None and image.removals == counted:
            # Nothing was removed since all of it was here.
            return directory, counted, set()
        blobs = [digest for digest in tree_blobs(view, directory) if digest.size]
    # What has no row is hashed now, as nobody will when it is opened. Rows of small trees are not taken at their word.
    missing = set(store.blobs.prepare(blobs))
    if len(blobs) <= LOOK_AT_MOST:
        missing.update(digest for digest in blobs if not store.blobs.has_file(digest))
    for digest in missing:
        _put_aside_damaged(store, digest)
    return directory, counted, missing


def _put_aside_damaged(store: Store, digest: Digest) -> None:
    """Of a file with the blob's name but another size the kernel would show as much as there is."""
    with suppress(MissingBlob, CorruptBlob):
        os.close(store.blobs.open(digest))


def _files(view: View, directory: Directory) -> Iterator[tuple[bytes, Digest]]:
    """Path and blob of each file with contents."""
    for path, entry in walk(view, directory):
        if isinstance(entry, FileEntry) and entry.digest.size:
            yield path, entry.digest
