"""The pyfuse3 session: the same tree through libfuse, for users and kernels without passthrough.

Reads pass through this process, once: files never change, so the kernel keeps
their pages between opens. The only module that imports pyfuse3 and trio.

Threads: everything runs in the trio loop; opens that may wait for a disk in
its worker threads. One such session per process (libfuse's limit).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from casfs.contents import Contents, explain
from casfs.errors import MountError, errno_of
from casfs.fusemount import SOURCE
from casfs.steered_tree import SteeredTree
from casfs.syscalls import read_cached
from casfs.trace_format import Kind
from casfs.tracing import Tracer
from casfs.tree import Node, NodeId, NoSuchNode, NotADirectory, Tree
from casfs.wire import FOREVER, OPEN_EXEC
from store.entries import FileEntry, ReferenceEntry, SymlinkEntry
from store.errors import StoreError

log = logging.getLogger("casfs")


class Pyfuse3Session:
    """Serves one tree at one place. Call `begin`, then `run`, in the same thread."""

    engine = "fuse"

    def __init__(self, mountpoint: Path, tree: Tree, contents: Contents, tracer: Tracer | None = None) -> None:
        """`tracer` is told of each upcall, and stays the caller's to close."""
        self._mountpoint = mountpoint
        self._operations = _Operations(tree, contents) if tracer is None else _Traced(tree, contents, tracer)

    def begin(self) -> None:
        """Mount. Raises MountError."""
        options = {f"fsname={SOURCE}", "subtype=casfs", "ro", "nosuid", "nodev", "default_permissions"}
        if os.geteuid() == 0:
            options.add("allow_other")
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), options)
        except RuntimeError as error:
            raise MountError(f"can't mount on {self._mountpoint}: {error}") from error

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        try:
            trio.run(pyfuse3.main)
        finally:
            pyfuse3.close(unmount=False)

    def use_tree(self, tree: SteeredTree) -> None:
        """See `casfs.steering.Steerable`."""
        self._operations.use_tree(tree)

    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool:
        """See `casfs.steering.Steerable`."""
        try:
            pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTEMPTY):
                return False
            raise
        return True

    def invalidate_inode(self, node_id: NodeId) -> None:
        """See `casfs.steering.Steerable`."""
        with suppress(FileNotFoundError):
            pyfuse3.invalidate_inode(pyfuse3.InodeT(node_id))

    def statistics(self) -> dict[str, Any]:
        """Upcalls by opcode (READ always among them), and what they led to; counts, and bytes where it says so."""
        operations = self._operations
        return {
            "engine": self.engine,
            "upcalls": {"READ": 0, **operations.counts},
            "served_bytes": operations.served_bytes,
            "failed_opens": operations.failed_opens,
        }


class _Operations(pyfuse3.Operations):
    """The translation between pyfuse3's handlers and the tree."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    entry_timeout = FOREVER
    """Seconds for which the kernel keeps a name without asking again."""

    def __init__(self, tree: Tree, contents: Contents) -> None:
        super().__init__()
        self._tree = tree
        self._steered: SteeredTree | None = None
        self._list_plus = tree.list_directory
        self._contents = contents
        self._uid, self._gid = os.getuid(), os.getgid()
        self.counts: Counter[str] = Counter()
        self.served_bytes = 0
        self.failed_opens = 0

    def use_tree(self, tree: SteeredTree) -> None:
        self._tree = self._steered = tree
        self._list_plus = tree.list_plus

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(node.id)
        attributes.st_mode = pyfuse3.ModeT(node.mode)
        attributes.st_nlink = node.nlink
        attributes.st_uid, attributes.st_gid = self._uid, self._gid
        attributes.st_size = node.size
        attributes.st_blksize, attributes.st_blocks = 4096, (node.size + 511) >> 9
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = node.mtime_ns
        attributes.entry_timeout, attributes.attr_timeout = self.entry_timeout, FOREVER
        return attributes

    def _get(self, inode: pyfuse3.InodeT) -> Node:
        try:
            return self._tree.get_node(NodeId(inode))
        except NoSuchNode:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.counts["LOOKUP"] += 1
        try:
            node = self._tree.lookup(NodeId(parent_inode), name)
        except NotADirectory:
            raise pyfuse3.FUSEError(errno.ENOTDIR) from None
        if node is not None:
            return self._attributes(node)
        # Inode 0 with a lifetime: the kernel remembers that there is no such name.
        nothing = pyfuse3.EntryAttributes()
        nothing.st_ino = pyfuse3.InodeT(0)
        nothing.entry_timeout = self.entry_timeout
        return nothing

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        self.counts["GETATTR"] += 1
        return self._attributes(self._get(inode))

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        self.counts["READLINK"] += 1
        entry = self._get(inode).entry
        if not isinstance(entry, SymlinkEntry):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return pyfuse3.FileNameT(entry.target)

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        # Not ENOSYS: pyfuse3 hands the inode to `readdir` only as the handle that is returned here.
        self.counts["OPENDIR"] += 1
        return pyfuse3.FileHandleT(inode)

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self.counts["RELEASEDIR"] += 1

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        self.counts["READDIRPLUS"] += 1
        try:
            for after, name, node in self._list_plus(NodeId(fh), start_id):
                attributes = self._attributes(node)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, after):
                    break
        except NotADirectory:
            raise pyfuse3.FUSEError(errno.ENOTDIR) from None

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self.counts["OPEN"] += 1
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        node = self._get(inode)
        entry = node.entry
        if not isinstance(entry, FileEntry | ReferenceEntry):
            raise pyfuse3.FUSEError(errno.EISDIR)
        descriptor = self._contents.open_now(entry)
        if descriptor is None:
            try:
                descriptor = await self._open_slowly(entry)
            except (StoreError, OSError) as error:
                self.failed_opens += 1
                log.error("%s", explain(error, self._tree.path_of(node.id)))
                raise pyfuse3.FUSEError(errno_of(error)) from error
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(descriptor), keep_cache=True)

    async def _open_slowly(self, entry: FileEntry | ReferenceEntry) -> int:
        """Open what may take a while, fetching what is missing.

        While that goes on the client can't be interrupted: libfuse tells nobody of it.
        """
        try:
            return await trio.to_thread.run_sync(self._contents.open, entry)
        except StoreError as error:
            fetching = self._contents.fetch(entry, error)
            if fetching is None:
                raise
        # No thread waits: a source that hangs must not hold those that others need.
        done, token = trio.Event(), trio.lowlevel.current_trio_token()

        def wake(_: object) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        fetching.add_done_callback(wake)
        await done.wait()
        fetching.result()
        return await trio.to_thread.run_sync(self._contents.open, entry)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        self.counts["READ"] += 1
        room = memoryview(bytearray(size))
        length = read_cached(fh, room, off)
        if length is None:
            data = await trio.to_thread.run_sync(os.pread, fh, size, off)
        else:
            data = bytes(room[:length])
        self.served_bytes += len(data)
        return data

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self.counts["RELEASE"] += 1
        os.close(fh)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        self.counts["STATFS"] += 1
        nodes, content = self._tree.totals()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks, data.f_bfree, data.f_bavail = (content + 4095) >> 12, 0, 0
        data.f_files, data.f_ffree, data.f_favail = nodes, 0, 0
        data.f_namemax = 255
        return data

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        self.counts["FORGET"] += 1
        if self._steered is not None:
            for inode, lookups in inode_list:
                self._steered.forget(NodeId(inode), lookups)


class _Traced(_Operations):
    """The same, with each use written down; `casfs.session_traced` says which names are kept."""

    entry_timeout = 0

    def __init__(self, tree: Tree, contents: Contents, tracer: Tracer) -> None:
        super().__init__(tree, contents)
        self._tracer = tracer
        # By directory: who opened it last, as `readdir` isn't told. Bounded by the tree's directories.
        self._listing: dict[int, int] = {}

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = super()._attributes(node)
        if stat.S_ISDIR(node.mode):
            attributes.entry_timeout = FOREVER
        return attributes

    def _note(self, kind: Kind, ctx: pyfuse3.RequestContext, inode: int) -> None:
        self._tracer.note(kind, ctx.pid, self._tree, NodeId(inode))

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = await super().lookup(parent_inode, name, ctx)
        if found.st_ino:
            self._note(Kind.LOOK, ctx, found.st_ino)
        else:
            self._tracer.note_miss(ctx.pid, self._tree, NodeId(parent_inode), name)
        return found

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        self._note(Kind.LINK, ctx, inode)
        return await super().readlink(inode, ctx)

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        self._listing[inode] = ctx.pid
        return await super().opendir(inode, ctx)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        self._tracer.note(Kind.LIST, self._listing.get(fh, 0), self._tree, NodeId(fh))
        await super().readdir(fh, start_id, token)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self._note(Kind.EXEC if flags & OPEN_EXEC else Kind.OPEN, ctx, inode)
        return await super().open(inode, flags, ctx)
