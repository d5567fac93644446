"""The native session: one mount, served over /dev/fuse in the kernel's own protocol.

A loop reads a request, answers it from the tree, writes the reply. What may
wait for a disk (opening what is not in the kernel's caches, hashing a blob
that isn't verified) goes to a pool of threads, so the loop never does.

Passthrough: an OPEN is answered with a backing id and the kernel does all I/O
on the blob itself. READ arrives only for files the kernel can't pass through,
and in sessions that were made without passthrough.

Everything is valid forever in the kernel's caches (`casfs.wire.FOREVER`), names
that don't exist too; OPENDIR, FLUSH, xattrs and the like are answered ENOSYS
once, which the kernel remembers.

Threads: `run` in one; `_waiting` and the registry are shared with the pool, by
operations that are atomic; replies are single writes. `statistics` and
`notify` may be called from any thread, `notify` never from inside a handler
(the kernel may hold the lock that the notification needs).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from casfs import wire
from casfs.backing import BackingRegistry
from casfs.contents import explain
from casfs.errors import BadRequest, CasfsError, MissingCapability, errno_of
from casfs.polling import DeviceReader
from casfs.steered_tree import SteeredTree
from casfs.syscalls import BackingId, read_cached
from casfs.tree import Node, NodeId, NoSuchNode, NotADirectory, NotYet, Tree, content_key
from casfs.wire import InitFlag, Opcode, OpenFlag
from store.entries import FileEntry, ReferenceEntry, SymlinkEntry
from store.errors import StoreError

log = logging.getLogger("casfs")

_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.READDIRPLUS
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
)
_MAX_WRITE = 4096
_MAX_PAGES = 256
_BUFFER = 64 << 10
"""Bytes for one request: the kernel wants 8,192 for `_MAX_WRITE`, and uses the rest to send many forgets at once."""
_POOL_THREADS = 8

_PASSED_THROUGH = int(OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH)
_KEPT = int(OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH)

_READ_HERE = 1 << 32
"""Set in the handle of a file this process reads; the rest is its descriptor. Without: a backing id."""

Handler = Callable[[int, int, bytes], bytes | None]
"""(unique, node id, body) → the reply, or None where there is none or it comes later."""


class Opener(Protocol):
    """Where a session gets contents from; `casfs.contents.Contents` is the real one."""

    def open_now(self, entry: FileEntry | ReferenceEntry) -> int | None: ...
    def open(self, entry: FileEntry | ReferenceEntry) -> int: ...


Fetch = Callable[[FileEntry | ReferenceEntry, Exception], "Future[None] | None"]
"""After an open failed with that error: what to wait for before another try, or None. Returns at once."""


class Session:
    """Serves one tree on one connection to the kernel."""

    def __init__(
        self,
        device: int,
        tree: Tree,
        contents: Opener,
        *,
        passthrough: bool,
        poll: bool = True,
        fetch: Fetch = lambda entry, error: None,
    ) -> None:
        """`device` is a descriptor of /dev/fuse that belongs to a mount, and to this session from now on."""
        self._fetch = fetch
        self._device = device
        self._tree = tree
        self._steered: SteeredTree | None = None
        self._list_plus = tree.list_directory
        self._contents = contents
        self._passthrough = passthrough
        self._reader = DeviceReader(device, _BUFFER, poll=poll)
        self._registry = BackingRegistry(device)
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "open")
        self._waiting: dict[int, str] = {}
        self._room = memoryview(bytearray(_MAX_PAGES * mmap.PAGESIZE))
        self._counts = [0] * wire.OPCODES
        self._counting = threading.Lock()
        self._served_bytes = 0
        self._failed_opens = 0
        self._uid, self._gid = os.getuid(), os.getgid()
        self._handlers = self._make_handlers()

    @property
    def engine(self) -> str:
        """What `casfs stats` calls this session."""
        return "passthrough" if self._passthrough else "native"

    def begin(self) -> None:
        """Answer the kernel's INIT: the first thing after the mount. The mount is usable afterwards.

        Raises MissingCapability where the kernel is too old, or does not offer
        the passthrough that was asked for.
        """
        while True:
            message = self._reader.read()
            if not message:
                raise CasfsError("the mount went away before it began")
            request = wire.decode_request(message)
            if request.opcode != Opcode.INIT:
                raise BadRequest(f"opcode {request.opcode} before INIT")
            self._counts[Opcode.INIT] += 1
            offer = wire.decode_init(request.body)
            if offer.major < wire.MAJOR or (offer.major == wire.MAJOR and offer.minor < wire.OLDEST_MINOR):
                self._send(wire.encode_error(request.unique, errno.EPROTO))
                raise MissingCapability(
                    f"the kernel speaks FUSE {offer.major}.{offer.minor}, this session needs "
                    f"{wire.MAJOR}.{wire.OLDEST_MINOR} (Linux 5.4): use --engine fuse"
                )
            if offer.major > wire.MAJOR:
                self._send(wire.encode_reply(request.unique, wire.encode_version()))
                continue
            if self._passthrough and not offer.flags & InitFlag.PASSTHROUGH:
                self._send(wire.encode_error(request.unique, errno.EPROTO))
                raise MissingCapability(
                    "the kernel doesn't offer FUSE passthrough: it needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH"
                )
            self._send(wire.encode_reply(request.unique, wire.encode_init(self._choose(offer))))
            return

    def _choose(self, offer: wire.InitRequest) -> wire.InitReply:
        wanted = _WANTED | InitFlag.PASSTHROUGH if self._passthrough else _WANTED
        return wire.InitReply(
            minor=min(offer.minor, wire.MINOR),
            max_readahead=offer.max_readahead,
            flags=wanted & offer.flags,
            max_background=64,
            max_write=_MAX_WRITE,
            max_pages=_MAX_PAGES,
            # One: blobs may not lie on an overlay, but an overlay may stand on this mount.
            max_stack_depth=1 if self._passthrough else 0,
        )

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        read, answer, send = self._reader.read, self._answer, self._send
        try:
            while message := read():
                if (reply := answer(message)) is not None:
                    send(reply)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, message: bytes) -> bytes | None:
        """The reply to one request, or None where there is none or it comes later."""
        try:
            opcode, unique, node, _, body = wire.decode_request(message)
        except BadRequest:
            log.exception("dropped a request")
            return None
        try:
            if opcode >= wire.OPCODES:
                return wire.encode_error(unique, errno.ENOSYS)
            self._counts[opcode] += 1
            return self._handlers[opcode](unique, node, body)
        except NotYet as later:
            self._waiting[unique] = str(later)
            later.future.add_done_callback(lambda done: self._look_again(unique, done))
            return None
        except NoSuchNode:
            number = errno.ESTALE
        except NotADirectory:
            number = errno.ENOTDIR
        except BadRequest as error:
            log.error("opcode %d: %s", opcode, error)
            number = errno.EINVAL
        except Exception as error:
            # Whatever it was, the client that waits must get an answer.
            log.exception("opcode %d on node %d", opcode, node)
            number = errno_of(error)
        return None if opcode in wire.NO_REPLY else wire.encode_error(unique, number)

    def _send(self, *parts: bytes | memoryview) -> None:
        try:
            if len(parts) == 1:
                os.write(self._device, parts[0])
            else:
                os.writev(self._device, parts)
        except OSError as error:
            # ENOENT: the request was interrupted; ENODEV: unmounted meanwhile. Nobody waits any more.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                raise

    def notify(self, message: bytes) -> bool:
        """Send a notification made by `casfs.wire`; False where the kernel had nothing of it cached."""
        try:
            os.write(self._device, message)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTEMPTY):
                return False
            raise
        return True

    def use_tree(self, tree: SteeredTree) -> None:
        """See `casfs.steering.Steerable`."""
        self._tree = self._steered = tree
        self._list_plus = tree.list_plus

    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool:
        """See `casfs.steering.Steerable`."""
        return self.notify(wire.notify_inval_entry(parent, name))

    def invalidate_inode(self, node_id: NodeId) -> None:
        """See `casfs.steering.Steerable`."""
        self.notify(wire.notify_inval_inode(node_id))

    def statistics(self) -> dict[str, Any]:
        """Upcalls by opcode (READ always among them), and what they led to; counts, and bytes where it says so."""
        counts = {op.name: self._counts[op] for op in Opcode if self._counts[op] or op is Opcode.READ}
        return {
            "engine": self.engine,
            "upcalls": counts,
            "served_bytes": self._served_bytes,
            "failed_opens": self._failed_opens,
            "backing_ids": self._registry.statistics(),
            "polling": self._reader.statistics(),
        }

    # Handlers: one per opcode, a request in, its reply out.

    def _make_handlers(self) -> list[Handler]:
        handlers: list[Handler] = [self._refuse(errno.ENOSYS)] * wire.OPCODES
        for opcode in _MODIFYING:
            handlers[opcode] = self._refuse(errno.EROFS)
        handlers[Opcode.IOCTL] = self._refuse(errno.ENOTTY)
        handlers[Opcode.LOOKUP] = self._lookup
        handlers[Opcode.FORGET] = self._forget
        handlers[Opcode.BATCH_FORGET] = self._forget_many
        handlers[Opcode.GETATTR] = self._getattr
        handlers[Opcode.READLINK] = self._readlink
        handlers[Opcode.OPEN] = self._open
        handlers[Opcode.READ] = self._read
        handlers[Opcode.STATFS] = self._statfs
        handlers[Opcode.RELEASE] = self._release
        handlers[Opcode.READDIR] = self._readdir
        handlers[Opcode.READDIRPLUS] = self._readdirplus
        handlers[Opcode.INTERRUPT] = self._interrupt
        handlers[Opcode.DESTROY] = lambda unique, node, body: wire.encode_reply(unique)
        return handlers

    @staticmethod
    def _refuse(number: int) -> Handler:
        return lambda unique, node, body: wire.encode_error(unique, number)

    def _forget(self, unique: int, node: int, body: bytes) -> None:
        """Node ids mean something without being remembered: there is nothing to forget, but of a steered tree."""
        if self._steered is not None:
            self._steered.forget(NodeId(node), wire.decode_forget(body))

    def _forget_many(self, unique: int, node: int, body: bytes) -> None:
        if self._steered is not None:
            for forgotten, lookups in wire.decode_forgotten(body):
                self._steered.forget(NodeId(forgotten), lookups)

    def _lookup(self, unique: int, node: int, body: bytes) -> bytes:
        found = self._tree.lookup(NodeId(node), wire.decode_name(body))
        if found is None:
            return wire.encode_no_entry(unique)
        number, mode, size, mtime_ns, nlink, *_ = found
        return wire.encode_entry(unique, number, mode, size, mtime_ns, nlink, self._uid, self._gid)

    def _getattr(self, unique: int, node: int, body: bytes) -> bytes:
        number, mode, size, mtime_ns, nlink, *_ = self._tree.get_node(NodeId(node))
        return wire.encode_attr(unique, number, mode, size, mtime_ns, nlink, self._uid, self._gid)

    def _readlink(self, unique: int, node: int, body: bytes) -> bytes:
        entry = self._tree.get_node(NodeId(node)).entry
        if not isinstance(entry, SymlinkEntry):
            return wire.encode_error(unique, errno.EINVAL)
        return wire.encode_reply(unique, entry.target)

    def _statfs(self, unique: int, node: int, body: bytes) -> bytes:
        return wire.encode_statfs(unique, *self._tree.totals())

    def _open(self, unique: int, node: int, body: bytes) -> bytes | None:
        if wire.decode_open(body) & (os.O_ACCMODE | os.O_TRUNC):
            # Before anything else: a blob that was passed through could be written by its opener.
            return wire.encode_error(unique, errno.EROFS)
        found = self._tree.get_node(NodeId(node))
        entry = found.entry
        if not isinstance(entry, FileEntry | ReferenceEntry):
            return wire.encode_error(unique, errno.EISDIR)
        if self._passthrough and isinstance(entry, FileEntry):
            backing_id = self._registry.find(entry.digest.key)
            if backing_id is not None:
                return _passed_through(unique, backing_id)
        descriptor = self._contents.open_now(entry)
        if descriptor is not None:
            return self._opened(unique, entry, descriptor)
        self._waiting[unique] = "open"
        self._pool.submit(self._open_slowly, unique, found, entry)
        return None

    def _opened(self, unique: int, entry: FileEntry | ReferenceEntry, descriptor: int) -> bytes:
        """The reply to an OPEN of which the content is open; takes the descriptor over."""
        if self._passthrough:
            try:
                backing_id = self._registry.register(content_key(entry), descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if backing_id is not None:
                os.close(descriptor)
                return _passed_through(unique, backing_id)
        return wire.encode_open(unique, _READ_HERE | descriptor, _KEPT)

    def _open_slowly(
        self, unique: int, node: Node, entry: FileEntry | ReferenceEntry, fetched: Future[None] | None = None
    ) -> None:
        """In the pool: open what may take a while, and answer; after `fetched` if that had to be waited for."""
        try:
            if fetched is not None:
                fetched.result()
            try:
                descriptor = self._contents.open(entry)
            except Exception as error:
                fetching = self._fetch(entry, error) if fetched is None else None
                if fetching is None:
                    raise
                # Nobody waits here: a source that hangs must not hold the pool's threads.
                fetching.add_done_callback(lambda done: self._submit(self._open_slowly, unique, node, entry, done))
                return
            reply = self._opened(unique, entry, descriptor)
        except Exception as error:
            with self._counting:
                self._failed_opens += 1
            line = explain(error, self._tree.path_of(node.id))
            log.error("%s", line, exc_info=None if isinstance(error, OSError | StoreError) else error)
            reply = wire.encode_error(unique, errno_of(error))
        if self._waiting.pop(unique, None) is not None:
            self._send(reply)
        else:
            self._abandon(reply)

    def _look_again(self, unique: int, done: Future[None]) -> None:
        """What a lookup waited for is there, or won't come."""
        what = self._waiting.pop(unique, None)
        if what is None:
            return  # interrupted
        error = done.exception()
        if error is None:
            number = errno.ESTALE
        else:
            with self._counting:
                self._failed_opens += 1
            log.error("%s: %s", what, error)
            number = errno_of(error) if isinstance(error, Exception) else errno.EIO
        self._send(wire.encode_error(unique, number))

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the session has ended meanwhile
            self._pool.submit(work, *arguments)

    def _abandon(self, reply: bytes) -> None:
        """The opener was interrupted and has its answer: undo what it won't release."""
        handle = wire.decode_opened(reply)
        if handle is not None:
            self._close_handle(handle)

    def _interrupt(self, unique: int, node: int, body: bytes) -> None:
        """Whoever waits for a slow open or lookup shall not wait on. Other requests are answered at once anyway."""
        target = wire.decode_interrupt(body)
        if self._waiting.pop(target, None) is not None:
            self._send(wire.encode_error(target, errno.EINTR))

    def _release(self, unique: int, node: int, body: bytes) -> bytes:
        self._close_handle(wire.decode_release(body))
        return wire.encode_reply(unique)

    def _close_handle(self, handle: int) -> None:
        if handle & _READ_HERE:
            os.close(handle & ~_READ_HERE)
        else:
            self._registry.release(BackingId(handle))

    def _read(self, unique: int, node: int, body: bytes) -> bytes | None:
        handle, offset, size = wire.decode_read(body)
        if not handle & _READ_HERE:
            return wire.encode_error(unique, errno.EBADF)
        descriptor = handle & ~_READ_HERE
        length = read_cached(descriptor, self._room[:size], offset)
        if length is None:
            self._pool.submit(self._read_slowly, unique, descriptor, offset, size)
        else:
            self._send_data(unique, self._room[:length])
        return None

    def _read_slowly(self, unique: int, descriptor: int, offset: int, size: int) -> None:
        """In the pool: read what isn't in the page cache, and answer. The kernel keeps the file open meanwhile."""
        try:
            self._send_data(unique, os.pread(descriptor, size, offset))
        except OSError as error:
            log.error("a read of %d bytes at %d failed: %s", size, offset, error)
            self._send(wire.encode_error(unique, errno_of(error)))

    def _send_data(self, unique: int, data: bytes | memoryview) -> None:
        with self._counting:
            self._served_bytes += len(data)
        self._send(wire.encode_header(unique, len(data)), data)

    def _readdir(self, unique: int, node: int, body: bytes) -> bytes:
        _, cookie, size = wire.decode_read(body)
        page = wire.DirectoryPage(size)
        if self._add_dots(NodeId(node), cookie, page.add_name):
            for after, name, found in self._tree.list_directory(NodeId(node), max(cookie - 2, 0)):
                if not page.add_name(found.id, after + 2, found.mode, name):
                    break
        return page.encode(unique)

    def _readdirplus(self, unique: int, node: int, body: bytes) -> bytes:
        _, cookie, size = wire.decode_read(body)
        page = wire.DirectoryPage(size)
        uid, gid, add = self._uid, self._gid, page.add_entry
        if self._add_dots(NodeId(node), cookie, page.add_bare):
            for after, name, found in self._list_plus(NodeId(node), max(cookie - 2, 0)):
                if not add(after + 2, name, *found[:5], uid, gid):
                    break
        return page.encode(unique)

    def _add_dots(self, node_id: NodeId, cookie: int, add: Callable[[int, int, int, bytes], bool]) -> bool:
        """Cookies: 1 and 2 stand after ``.`` and ``..``, those of the tree come after them. False: no room for more."""
        if cookie < 1 and not add(node_id, 1, stat.S_IFDIR, b"."):
            return False
        return cookie >= 2 or add(self._tree.parent_of(node_id), 2, stat.S_IFDIR, b"..")


_MODIFYING = (
    Opcode.SETATTR,
    Opcode.SYMLINK,
    Opcode.MKNOD,
    Opcode.MKDIR,
    Opcode.UNLINK,
    Opcode.RMDIR,
    Opcode.RENAME,
    Opcode.RENAME2,
    Opcode.LINK,
    Opcode.WRITE,
    Opcode.SETXATTR,
    Opcode.REMOVEXATTR,
    Opcode.CREATE,
    Opcode.FALLOCATE,
    Opcode.COPY_FILE_RANGE,
    Opcode.TMPFILE,
)


def _passed_through(unique: int, backing_id: BackingId) -> bytes:
    return wire.encode_open(unique, backing_id, _PASSED_THROUGH, backing_id)
