"""The native session for a tree whose use is traced: it tells a `Tracer` of each upcall, then answers it.

What the kernel has cached it asks nobody for. So that what a process touches
first is seen, whoever touched it before, nothing is cached here that would
hide it: names of files and links are looked up anew at each use, missing ones
too, links are read and directories listed by upcalls. Directories are looked
up once in all, since they are on the way to everything and are no inputs.
Attributes and file contents are kept as ever: who has them has looked the name
up. That costs an upcall a path that is used.

A class of its own, chosen when the session is made, so that the session of
every other mount has nothing to ask itself at an upcall.
"""

from __future__ import annotations

import stat
from typing import Any

from casfs import wire
from casfs.session import Handler, Session
from casfs.trace_format import Kind
from casfs.tracing import Tracer
from casfs.tree import NodeId
from casfs.wire import InitFlag, Opcode

_HIDING = InitFlag.READDIRPLUS | InitFlag.CACHE_SYMLINKS | InitFlag.NO_OPENDIR_SUPPORT
"""With these the kernel keeps names, links and listings without asking again."""


class TracedSession(Session):
    """Serves one tree on one connection to the kernel, and has each use written down."""

    def __init__(self, *arguments: Any, tracer: Tracer, **options: Any) -> None:
        """As `Session`, and who is told. The tracer stays the caller's to close."""
        super().__init__(*arguments, **options)
        self._tracer = tracer
        # Of the request that is being answered: only the thread of `run` reads or writes it.
        self._thread = 0

    def _choose(self, offer: wire.InitRequest) -> wire.InitReply:
        return super()._choose(offer).without(_HIDING)

    def _answer(self, message: bytes) -> bytes | None:
        self._thread = wire.thread_of(message)
        return super()._answer(message)

    def _make_handlers(self) -> list[Handler]:
        handlers = super()._make_handlers()
        handlers[Opcode.OPENDIR] = self._opendir
        handlers[Opcode.RELEASEDIR] = lambda unique, node, body: wire.encode_reply(unique)
        return handlers

    def _note(self, kind: Kind, node: int) -> None:
        self._tracer.note(kind, self._thread, self._tree, NodeId(node))

    def _lookup(self, unique: int, node: int, body: bytes) -> bytes:
        reply = super()._lookup(unique, node, body)
        if found := wire.decode_entry(reply):
            self._note(Kind.LOOK, found)
            if stat.S_ISDIR(self._tree.get_node(NodeId(found)).mode):
                return reply
        else:
            self._tracer.note_miss(self._thread, self._tree, NodeId(node), wire.decode_name(body))
        return wire.forget_entry(reply)

    def _open(self, unique: int, node: int, body: bytes) -> bytes | None:
        flags = wire.decode_open(body)
        self._note(Kind.EXEC if flags & wire.OPEN_EXEC else Kind.OPEN, node)
        return super()._open(unique, node, body)

    def _readlink(self, unique: int, node: int, body: bytes) -> bytes:
        self._note(Kind.LINK, node)
        return super()._readlink(unique, node, body)

    def _opendir(self, unique: int, node: int, body: bytes) -> bytes:
        # An opened directory is one that may be looked into: only READDIR says that it was.
        return wire.encode_open(unique, 0, 0)

    def _readdir(self, unique: int, node: int, body: bytes) -> bytes:
        self._note(Kind.LIST, node)
        return super()._readdir(unique, node, body)
